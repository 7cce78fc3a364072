"""Training from a mixture: the only room that imports torch, transformers, trl, peft and bitsandbytes."""
