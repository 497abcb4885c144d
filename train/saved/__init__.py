"""What a run leaves on the disk: its folder, its checkpoints, and weights taken from them."""
