"""Room: encoders. Captions and pixels to tensors; the only room that imports transformers, inside functions."""
