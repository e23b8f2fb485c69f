"""FedNova (Wang et al., NeurIPS 2020, arXiv:2007.07481): clients that go further do not count for more."""

import torch

from fedmerge.merge import average
from fedmerge.pipeline import Aggregate
from strategies._federated import Served
from strategies._replies import ClientResult


class FedNova(Served):
    r"""Flower strategy: averages the clients' directions, each divided by how far its steps reach.

    With the global network x, the clients' networks :math:`y_i`, their shares of the images :math:`p_i` and their
    reach :math:`h_i`,

    .. math:: x^+ = x - \Big(\sum_i p_i h_i\Big) \sum_i p_i \frac{x - y_i}{h_i} .

    The paper writes a client's way as :math:`x - y_i = \eta G_i a_i`, with its gradients :math:`G_i` and a vector
    :math:`a_i` that is the optimiser's: :math:`h_i = \eta \|a_i\|_1`. For SGD with momentum :math:`\rho` and
    :math:`\tau_i` steps at one rate :math:`\|a_i\|_1 = (\tau_i - \rho (1 - \rho^{\tau_i}) / (1 - \rho)) / (1 - \rho)`;
    clients report what their own momentum and schedule come to (``Training.reach``). The first sum is the paper's
    :math:`\eta \tau_\text{eff}` in the form that is FedAvg where all reach as far.

    Local optimisers: SGD, with or without momentum, Nesterov's, L2 decay and schedules. Adam's steps are no sum of
    gradients, so a run with it is refused, as is an independent initialisation, which has no common x. Not built: the
    paper's proximal local solver, and momentum on the server. Statistics of normalisation layers are averaged.

    Of what every strategy is given, the pipeline is not used.
    """

    by_reach = True

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """A step along the mean of the normalised directions."""
        sent = self._sent.to_torch_state_dict()
        params = average([r.params for r in results], [r.examples for r in results])
        total = sum(r.examples for r in results)
        reach = sum(r.examples * r.reach for r in results) / total
        for name in self.federation.parameters:
            x = sent[name].double()
            step = torch.zeros_like(x)
            for r in results:
                step += (x - r.params[name].double()) * (r.examples * reach / (total * r.reach))
            params[name] = (x - step).to(params[name].dtype)
        self.on_stage(server_round, "aggregated", params)
        return Aggregate(params)
