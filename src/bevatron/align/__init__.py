"""Alignment: supervised fine-tuning, adapters, rewards, preferences, reinforcement learning."""
