"""The method (token merge after the vision encoder, pruning inside the decoder) in plain PyTorch.

Written from the description of the method, on the weights of Transformers' LLaVA modules, for being
right and readable, not fast: images and batch rows are handled one at a time wherever the method
speaks of one. It is what the golden vectors under models/llava/goldens are made with.
"""
