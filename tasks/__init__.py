"""What a fine-tuning task is: its texts, labels, metrics and files (README.md)."""
