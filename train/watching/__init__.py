"""What a training shows while it runs: meter, TensorBoard, traces, and how well loading hides behind the step."""
