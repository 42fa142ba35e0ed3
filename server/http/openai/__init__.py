"""OpenAI's HTTP API, with vLLM's extensions of it, over the runtime."""
