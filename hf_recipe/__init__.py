"""The recipe for training neural networks, made executable for Hugging Face's Trainer."""
