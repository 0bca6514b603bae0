"""Exchange with other projects: models of transformers, vocabularies, the Hugging Face hub."""
