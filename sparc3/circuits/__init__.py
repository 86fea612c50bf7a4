"""Sets of neurons: chosen, kept, removed from a model, compared with each other and with chance.
Imports relevance, model and base."""
