"""A language model: where its neurons are, how it is loaded, how GGUF becomes a folder. Imports
base."""
