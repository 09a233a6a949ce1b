"""The training program. Start reading at train/lora.py."""
