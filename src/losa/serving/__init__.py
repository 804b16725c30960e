"""`losa serve`: transformers' own OpenAI-compatible server and its continuous batching, with one model."""
