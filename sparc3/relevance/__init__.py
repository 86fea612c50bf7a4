"""A number for every neuron: LRP and other scores per prompt, and what contrasts two sets of
them. Imports model and base."""
