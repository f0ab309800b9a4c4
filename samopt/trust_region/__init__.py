"""Trust regions: the answers to how large the radius of TRAM is at this step."""

from samopt.trust_region.call import ForwardCall
from samopt.trust_region.divergence import DIVERGENCES, Divergence
from samopt.trust_region.input_noise import InputNoise
from samopt.trust_region.protocol import RadiusSource, StatefulTrustRegion, TrustRegion
from samopt.trust_region.references import EMA, Pretrained, PreviousStep

__all__ = [
    "DIVERGENCES",
    "EMA",
    "TRUST_REGIONS",
    "Divergence",
    "ForwardCall",
    "InputNoise",
    "Pretrained",
    "PreviousStep",
    "RadiusSource",
    "StatefulTrustRegion",
    "TrustRegion",
]

TRUST_REGIONS = {"previous": PreviousStep, "ema": EMA, "pretrained": Pretrained, "input_noise": InputNoise}
"""The names that ``TRAM`` knows."""
