"""The parts of `experiments.decoder_text`: text, model, training, table."""
