"""Linear layers and embeddings whose matrix is one MPO: `MPOExperts` of one expert behind PyTorch's own interfaces.

Shape letters: T tokens, V rows of the embedding, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mpoe.nn.autocast import without_autocast
from mpoe.nn.experts import MPOExperts
from mpoe.nn.grouped import all_rows, is_known_to_host


class MPOLinear(nn.Module):
    """A linear layer y = W x + b whose W is an MPO.

    Args:
        experts: One expert; its bias is the layer's.

    Raises:
        ValueError: More than one expert.
    """

    def __init__(self, experts: MPOExperts) -> None:
        super().__init__()
        self.experts = _single(experts)
        self.in_features = experts.dims.in_features
        self.out_features = experts.dims.out_features

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """W x + b for every row of x."""
        return _apply(self.experts, x)


class MPOEmbedding(nn.Module):
    """An embedding whose table V × D is an MPO.

    Args:
        experts: One expert without a bias; its outputs are the V rows.
        padding_idx: A token whose row gets no gradient, as in `nn.Embedding`; None is no such token.

    Attributes:
        num_embeddings: V.
        embedding_dim: D.

    Raises:
        ValueError: More than one expert, or a bias.
    """

    def __init__(self, experts: MPOExperts, padding_idx: int | None = None) -> None:
        super().__init__()
        if experts.bias is not None:
            raise ValueError("an embedding has no bias; its experts have one: make them with bias='none'")
        self.experts = _single(experts)
        self.num_embeddings = experts.dims.out_features
        self.embedding_dim = experts.dims.in_features
        self.padding_idx = padding_idx

    def forward(self, token_ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """The rows of the table; in its own dtype under autocast too, as those of `nn.Embedding` are.

        Args:
            token_ids: 0 .. V - 1.

        Raises:
            ValueError: Ids outside of the table.
        """
        ids_T = token_ids.reshape(-1)
        if len(ids_T) and is_known_to_host(ids_T.device):  # elsewhere the lookup itself fails
            low, high = (int(end) for end in ids_T.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise ValueError(
                    f"token ids must be in 0..{self.num_embeddings - 1}; got {low}..{high}: use the model's tokenizer"
                )
        with without_autocast(ids_T.device):
            rows_TD = nn.functional.embedding(ids_T, self._table())
        if self.padding_idx is not None and torch.is_grad_enabled():
            rows_TD = torch.where(ids_T[:, None] == self.padding_idx, rows_TD.detach(), rows_TD)
        return rows_TD.view(*token_ids.shape, self.embedding_dim)

    def _table(self) -> Tensor:
        if torch.is_grad_enabled() or not is_known_to_host(self.experts.central.device):
            return self.experts.expert_matrix(0)
        return self.experts.matrix(0, self.experts.central.dtype)

    def __getattr__(self, name: str) -> Any:
        # Transformers asks for it where a table is to be resized or tied, and the usual message would not help.
        if name == "weight":
            raise AttributeError(
                "an embedding must be dense to have a weight that can be resized or tied; this one is a matrix product "
                "operator: do that before mpoe.upcycle, or multiply it out with experts.expert_matrix(0)"
            )
        return super().__getattr__(name)


class MPOTiedHead(nn.Module):
    """A language-model head without parameters of its own: logits = W x with W the table of an embedding.

    Args:
        embedding: It stays the only owner of the table, which is so stored, moved and counted once.
    """

    embedding: MPOEmbedding

    def __init__(self, embedding: MPOEmbedding) -> None:
        super().__init__()
        refer(self, "embedding", embedding)
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """The product of x with every row of the table."""
        return _apply(self.embedding.experts, x)

    def requires_grad_(self, requires_grad: bool = True) -> MPOTiedHead:
        """As a dense tied head, whose weight is the table: both are frozen or trained together."""
        self.embedding.requires_grad_(requires_grad)
        return self


def refer(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Let a module call another one that it does not own: no submodule, so nothing is stored, moved or counted twice.

    Copies and pickles of both together keep the reference.

    Args:
        owner: The module that calls.
        name: Its attribute; a submodule of that name is replaced.
        module: The module that is called.
    """
    owner._modules.pop(name, None)
    vars(owner)[name] = module


def _single(experts: MPOExperts) -> MPOExperts:
    if experts.num_experts != 1:
        raise ValueError(f"a layer without a router must have num_experts = 1; got {experts.num_experts}")
    return experts


def _apply(experts: MPOExperts, x: Tensor) -> Tensor:
    x_TD = x.reshape(-1, x.shape[-1])
    return experts(x_TD, all_rows(x_TD)).view(*x.shape[:-1], experts.dims.out_features)
