"""Convolutions as long as the sequence: any kernel, and those of diagonal state-space models."""

from .convolution import fft_conv
from .ssm import diagonal_ssm, diagonal_ssm_step, ssm_kernel

__all__ = ["diagonal_ssm", "diagonal_ssm_step", "fft_conv", "ssm_kernel"]
