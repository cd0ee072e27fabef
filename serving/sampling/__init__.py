"""Sampling parameters and the next token, by numpy alone: what programs import."""

from serving.sampling.sampler import MAX_BIAS, MAX_SEED, MAX_TEMPERATURE, SamplingParams, choose, uniform

__all__ = ["MAX_BIAS", "MAX_SEED", "MAX_TEMPERATURE", "SamplingParams", "choose", "uniform"]
