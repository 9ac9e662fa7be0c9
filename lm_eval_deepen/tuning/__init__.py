"""Choosing an ensemble's options: by bits per byte of unlabelled text, or by the score on a development split."""
