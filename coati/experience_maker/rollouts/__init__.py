"""What samples responses for training: the trained model itself, or engines elsewhere."""
