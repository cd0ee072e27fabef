"""What proves numbers: fixtures from Hugging Face's PyTorch GPT-2, the script that made them, and their reader."""
