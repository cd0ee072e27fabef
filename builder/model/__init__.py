"""GPT-2 in Keras, and the checkpoints that it starts from."""
