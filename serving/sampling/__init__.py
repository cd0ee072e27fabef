"""Sampling parameters and the next token, by numpy alone: what programs import."""

from serving.sampling.parameters import DECLARATIONS, MAX_BIAS, MAX_SEED, MAX_TEMPERATURE, SamplingParams, SamplingRows
from serving.sampling.sampler import sample_tokens, uniform

__all__ = [
    "DECLARATIONS",
    "MAX_BIAS",
    "MAX_SEED",
    "MAX_TEMPERATURE",
    "SamplingParams",
    "SamplingRows",
    "sample_tokens",
    "uniform",
]
