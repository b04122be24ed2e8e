"""A video is encoded once: KV of prompts with pixels, kept by content, and the forward that uses it."""
