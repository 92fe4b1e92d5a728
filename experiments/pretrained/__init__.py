"""What networks of others, trained on ImageNet, are calibrated with and read on."""
