"""A small ERNIE-style Mixture-of-Experts language model, trained with ``sonicmoe`` on Paddle.

``data`` text and batches, ``model`` the network, ``experts`` what runs the experts, ``optimizer`` AdamW over
``main_grad``, ``trainer`` one training step and checkpoints, ``plot`` the figure.
``examples/train_ernie_moe.py`` puts them together.
"""
