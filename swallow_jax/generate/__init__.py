"""Generation and scoring: one door (`backends`) to the JAX engine, an OpenAI-compatible endpoint or a recorded file."""
