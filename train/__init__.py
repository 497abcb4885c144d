"""AlexNet and its training: networks, the paper's update rule, the loop, checkpoints, evaluation."""
