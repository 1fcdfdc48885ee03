"""What the layers are probably fed, from the weights alone: the data-free mode.

The family knows what follows from what (Shape.assumed_inputs); here is what it is made of. What stays unknown is the residual
stream itself: each token's LayerNorm is taken as Gaussian, louder where the weights that read a channel are small, which is
how trained networks make up for loud channels. For drafts; captured statistics are better.

Test: tests/unit/test_quantize_run.py
"""

import torch

from .calibration import LayerStatistics

TOKENS = 192
SPREAD_OF_ATTENTION = 0.5       # of averaged values against single ones


class Assumed:
    """self[layer] -> LayerStatistics of one of the layers of a source, computed when asked for.

    The other members are for families: the same seed and name give the same numbers.
    """

    def __init__(self, source, seed=0, device="cpu"):
        self.source, self.seed, self.device = source, seed, torch.device(device)
        self._inputs = source.shape.assumed_inputs(self)

    def __getitem__(self, layer):
        tokens = self._inputs.tokens(layer)
        return LayerStatistics(tokens.mean(0), tokens.square().mean(0), tokens.abs().amax(0), tokens)

    def random(self, name):
        return torch.Generator().manual_seed(self.seed + sum(map(ord, name)))

    def plain(self, *prefixes):
        """{name: fp32 tensor on the CPU} of what is not quantised and has such a name."""
        return {name: tensor.float().cpu() for name, tensor in self.source.plain() if name.startswith(prefixes)}

    def linear(self, layer):
        """(weight, bias) of a layer, fp32 on the device."""
        weight, bias = self.source.layer(layer)
        weight = weight.to(self.device).float()
        return weight, weight.new_zeros(len(weight)) if bias is None else bias.to(self.device).float()

    def drawn(self, count, name):
        """Which of `count` things each token has to do with: [TOKENS] indices."""
        return torch.randint(count, (TOKENS,), generator=self.random(name)).to(self.device)

    def normed(self, reader):
        """Tokens [TOKENS, K] as a LayerNorm leaves them, for the layer that reads them."""
        columns = self.linear(reader)[0].square().mean(0)
        loud = (columns.mean() / columns.clamp(min=1e-3 * float(columns.mean()) + 1e-30)).pow(0.25)
        return torch.randn(TOKENS, len(loud), generator=self.random(reader)).to(self.device) * loud

    @staticmethod
    def averaged(values):
        """What attention makes of values: the mean stays, the rest shrinks."""
        mean = values.mean(0)
        return mean + SPREAD_OF_ATTENTION * (values - mean)
