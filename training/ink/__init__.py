"""Ink, the small handwriting world that ships inside the package: its pictures, captions, tokenizer and detector."""
