"""The values that MLflow's client takes, as tuples."""


def Metric(*values: object) -> tuple:
    return values


def Param(*values: object) -> tuple:
    return values
