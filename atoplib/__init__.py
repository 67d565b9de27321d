"""AToP: adversarial training on purification (Lin et al., ICLR 2024): transforms, purifiers, losses, evaluation."""

__version__ = "0.1.0"
