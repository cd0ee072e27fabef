"""Whole generations beside KerasHub: ours by the SavedModel, its by `GPT2CausalLM` compiled."""
