"""D-FINE's network: the layers are transformers', the passes through them are here.

transformers' forward noises denoising queries otherwise than the paper, has no plain regression to
compare with, and returns every layer at inference or none. Its layers equal the official ones.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DFineConfig, DFineForObjectDetection

from cohobate.detection.boxes import Targets, to_xyxy
from cohobate.detection.d_fine.criterion import Outputs
from cohobate.detection.d_fine.denoising import Denoising, Queries, inverse_sigmoid
from cohobate.detection.d_fine.losses import decode, expected_offsets, weighting

Regression = Literal["fdr", "plain"]


class Detections(NamedTuple):
    """The best detections of a batch.

    Attributes:
        labels: ``(B, K)`` class indices.
        boxes: ``(B, K, 4)`` xyxy in pixels of the original images.
        scores: ``(B, K)``, falling.
    """

    labels: Tensor
    boxes: Tensor
    scores: Tensor


def best(logits: Tensor, boxes: Tensor, sizes: Tensor, top: int = 300) -> Detections:
    """The highest scores over all queries and classes; there is no suppression.

    Args:
        logits: ``(B, Q, C)``.
        boxes: ``(B, Q, 4)`` normalised cxcywh.
        sizes: ``(B, 2)`` width and height of the original images.
        top: K, at most Q · C.
    """
    classes = logits.shape[-1]
    scores, place = logits.sigmoid().flatten(1).topk(min(top, logits[0].numel()))
    query = (place // classes)[..., None].expand(-1, -1, 4)
    corners = to_xyxy(boxes).gather(1, query) * sizes.to(boxes.dtype).repeat(1, 2)[:, None]
    return Detections(place % classes, corners, scores)


class Memory(NamedTuple):
    """What the encoder hands to the decoder.

    Attributes:
        tokens: ``(B, S, D)`` of all levels.
        shapes: Height and width of each level.
        content: ``(B, Q, D)`` the selected tokens, the first content of the queries.
        logits: ``(B, Q, C)`` their class logits.
        boxes: ``(B, Q, 4)`` their boxes before the sigmoid.
    """

    tokens: Tensor
    shapes: list[tuple[int, int]]
    content: Tensor
    logits: Tensor
    boxes: Tensor


class DFineNet(nn.Module):
    """D-FINE with fine-grained distribution refinement or, to compare with, plain box regression.

    Called with images and their original sizes it gives `Detections`.

    Args:
        config: See `cohobate.detection.d_fine.sizes.config_of`.
        regression: ``fdr`` refines distributions of the edges; ``plain`` adds four numbers to the
            box in every layer, as RT-DETR does, and has neither distributions nor the quality
            estimate made from them.
        top: Detections of an image.
    """

    bins: Tensor | None

    def __init__(
        self, config: DFineConfig, *, regression: Regression = "fdr", top: int = 300
    ) -> None:
        super().__init__()
        self.config, self.regression, self.top = config, regression, top
        self.model: Any = DFineForObjectDetection(config).model
        self.model.backbone.model.embedder.pool = StemPool()
        initialise(self.model)
        if regression == "plain":
            self._make_plain()
        if config.freeze_backbone_batch_norms:
            self.model.backbone.model.embedder.requires_grad_(False)
        self.register_buffer("bins", None)

    def _make_plain(self) -> None:
        """Heads of four numbers; all other weights are those that ``fdr`` starts with."""
        decoder = self.model.decoder
        with torch.random.fork_rng(devices=[]):
            for head in decoder.bbox_embed:
                head.layers[-1] = nn.Linear(self.config.d_model, 4)
                nn.init.zeros_(head.layers[-1].weight)
                nn.init.zeros_(head.layers[-1].bias)
        decoder.pre_bbox_head = nn.Identity()
        decoder.lqe_layers = nn.ModuleList(nn.Identity() for _ in decoder.lqe_layers)

    def forward(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detect.

        Args:
            images: ``(B, 3, H, W)`` RGB in [0, 1].
            sizes: ``(B, 2)`` width and height of the original images.
        """
        logits, boxes = self.predict(images)
        return best(logits, boxes, sizes, self.top)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's class logits ``(B, Q, C)`` and normalised boxes ``(B, Q, 4)``."""
        memory = self.encode(images)
        found = self._decode(memory.content, memory.boxes, memory, None, every=False)
        return found.logits[-1], found.boxes[-1]

    def outputs(
        self, images: Tensor, targets: Targets | None = None, denoising: Denoising | None = None
    ) -> tuple[Outputs, tuple[Outputs, Tensor, int] | None]:
        """All outputs, as the criterion takes them.

        Args:
            images: ``(B, 3, H, W)`` RGB in [0, 1].
            targets: Objects to make denoising queries of.
            denoising: How.

        Returns:
            Outputs of the matching queries; outputs, objects and groups of the denoising ones.
        """
        memory = self.encode(images)
        noised: Queries | None = None
        if targets is not None and denoising is not None:
            noised = denoising(targets, memory.logits.shape[-1], self.config.num_queries)
        content, boxes, blocked = memory.content, memory.boxes, None
        if noised is not None:
            labels = self.model.denoising_class_embed(noised.labels).to(content.dtype)
            content = torch.cat([labels, content], 1)
            boxes = torch.cat([noised.boxes.to(boxes.dtype), boxes], 1)
            blocked = noised.blocked
        found = self._decode(content, boxes.detach(), memory, blocked, every=True)
        split = 0 if noised is None else noised.labels.shape[1]
        main = Outputs(
            torch.cat([found.logits[:, :, split:], memory.logits[None]]),
            torch.cat([found.boxes[:, :, split:], memory.boxes.sigmoid()[None]]),
            None if found.edges is None else found.edges[:, :, split:],
            None if found.reference is None else found.reference[:, split:],
            (*found.others, "enc_0"),
        )
        if noised is None:
            return main, None
        part = Outputs(
            found.logits[:, :, :split],
            found.boxes[:, :, :split],
            None if found.edges is None else found.edges[:, :, :split],
            None if found.reference is None else found.reference[:, :split],
            found.others,
        )
        return main, (part, noised.match, noised.groups)

    def encode(self, images: Tensor) -> Memory:
        """Backbone, encoder, and the choice of Q tokens by their best class logit."""
        net = self.model
        maps = net.backbone.model(images).feature_maps
        maps = [project(x) for project, x in zip(net.encoder_input_proj, maps, strict=True)]
        maps = net.encoder(maps).last_hidden_state
        maps = [project(x) for project, x in zip(net.decoder_input_proj, maps, strict=True)]
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        # anchors in half precision would be off by pixels
        exact = torch.promote_types(tokens.dtype, torch.float32)
        anchors, valid = net.generate_anchors(tuple(shapes), device=tokens.device, dtype=exact)
        memory = net.enc_output(valid.to(tokens.dtype) * tokens)
        logits = net.enc_score_head(memory)
        place = logits.amax(-1).topk(self.config.num_queries, 1).indices[..., None]

        def pick(x: Tensor) -> Tensor:
            return x.gather(1, place.expand(-1, -1, x.shape[-1]))

        content = pick(memory)
        boxes = net.enc_bbox_head(content) + pick(anchors.expand(tokens.shape[0], -1, -1))
        return Memory(tokens, shapes, content.detach(), pick(logits), boxes)

    def _decode(
        self,
        content: Tensor,
        boxes: Tensor,
        memory: Memory,
        blocked: Tensor | None,
        *,
        every: bool,
    ) -> Outputs:
        """All decoder layers; class logits of each layer, or of the last one only."""
        decoder = self.model.decoder
        # the layers only check its sum, which no exported graph should do
        shapes = np.array(memory.shapes, dtype=object)
        mask = None
        if blocked is not None:
            mask = torch.zeros(blocked.shape, dtype=content.dtype, device=content.device)
            mask = mask.masked_fill_(blocked, -torch.inf)[None, None]
        state = _State(boxes.sigmoid(), self._weights())
        logits, placed, edges = [], [], []
        for n, layer in enumerate(decoder.layers):
            box = state.box.detach()
            content = layer(
                content,
                position_embeddings=decoder.query_pos_head(box).clamp(-10, 10),
                reference_points=box[:, :, None],
                spatial_shapes=shapes,
                spatial_shapes_list=memory.shapes,
                encoder_hidden_states=memory.tokens,
                encoder_attention_mask=mask,
            )
            refine = self._refine_edges if self.regression == "fdr" else self._refine_box
            refine(n, content, state)
            if every or n == len(decoder.layers) - 1:
                score = decoder.class_embed[n](content)
                if n == 0:
                    state.first_logits = score
                if state.edges is not None:
                    score = decoder.lqe_layers[n](score, state.edges.flatten(-2))
                    edges.append(state.edges)
                logits.append(score)
                placed.append(state.box)
        others: tuple[str, ...] = ()
        if state.initial is not None and state.first_logits is not None:
            logits.append(state.first_logits)
            placed.append(state.initial)
            others = ("pre",)
        return Outputs(
            torch.stack(logits),
            torch.stack(placed),
            torch.stack(edges) if edges else None,
            None if state.initial is None else state.initial.detach(),
            others,
        )

    def _refine_edges(self, n: int, content: Tensor, state: _State) -> None:
        """FDR, equation 1: the distributions' logits grow by what each layer adds."""
        decoder = self.model.decoder
        if n == 0:
            head = decoder.pre_bbox_head(content)
            state.initial = (head + inverse_sigmoid(state.box)).sigmoid()
        assert state.initial is not None
        added = decoder.bbox_embed[n](content + state.content).unflatten(-1, (4, -1))
        state.edges = added if state.edges is None else added + state.edges
        offsets = expected_offsets(state.edges, state.weights)
        state.box = decode(state.initial.detach(), offsets, decoder.reg_scale)
        state.content = content.detach()

    def _refine_box(self, n: int, content: Tensor, state: _State) -> None:
        """Plain iterative regression; the gradient goes one layer back ("look forward twice")."""
        head = self.model.decoder.bbox_embed[n](content)
        state.box, state.next = (
            (head + inverse_sigmoid(state.next)).sigmoid(),
            (head + inverse_sigmoid(state.box.detach())).sigmoid(),
        )

    def _weights(self) -> Tensor:
        if self.bins is not None:
            return self.bins
        decoder = self.model.decoder
        return weighting(self.config.max_num_bins, decoder.up, decoder.reg_scale)


class StemPool(nn.Module):
    """The maximum of 2 × 2 pixels at stride 1.

    torch's own kernel is many times slower on a CPU in the layout of the images.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → ``(B, C, H - 1, W - 1)``."""
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return F.max_pool2d(x, 2, 1)
        if x.requires_grad:  # the fast kernel is that of the other layout
            return F.max_pool2d(x.contiguous(memory_format=torch.channels_last), 2, 1).contiguous()
        rows = torch.maximum(x[..., :-1, :], x[..., 1:, :])
        return torch.maximum(rows[..., :-1], rows[..., 1:])


class _State:
    """What goes from layer to layer beside the content.

    Attributes:
        box: The layer's boxes ``(B, Q, 4)``.
        weights: W.
        initial: b⁰ of FDR, with gradient.
        edges: Logits of the edges' distributions.
        content: The previous layer's content, without gradient; 0 before the first.
        next: Boxes that the next layer of plain regression adds to, with gradient.
        first_logits: Class logits of the first layer without the quality estimate.
    """

    def __init__(self, box: Tensor, weights: Tensor) -> None:
        self.box, self.weights, self.next = box, weights, box
        self.initial: Tensor | None = None
        self.edges: Tensor | None = None
        self.content: Tensor | float = 0.0
        self.first_logits: Tensor | None = None


@torch.no_grad()
def initialise(model: Any) -> None:
    """Set the weights as the official code does before training from scratch.

    transformers draws linear layers from N(0, 0.01²), leaves the last layers of two box heads as
    they are, and gives the padding class of the denoising queries an embedding.
    """
    decoder = model.decoder
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            module.reset_parameters()
    prior = torch.tensor(0.01).logit().item()
    for layer in decoder.layers:
        attention = layer.encoder_attn
        for linear in (attention.sampling_offsets, attention.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        attention.sampling_offsets.bias.copy_(_rays(attention))
        nn.init.zeros_(layer.gateway.gate.weight)
        nn.init.zeros_(layer.gateway.gate.bias)
        for linear in layer.mlp.layers:
            nn.init.xavier_uniform_(linear.weight)
    for attention in (m for m in model.modules() if hasattr(m, "q_proj")):
        _as_one_projection(attention)
    last = [model.enc_bbox_head.layers[-1], *(h.layers[-1] for h in decoder.bbox_embed)]
    last += [lqe.reg_conf.layers[-1] for lqe in decoder.lqe_layers]
    last.append(decoder.pre_bbox_head.layers[-1])
    for linear in last:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    for head in (model.enc_score_head, *decoder.class_embed):
        nn.init.constant_(head.bias, prior)
    nn.init.xavier_uniform_(model.enc_output[0].weight)
    for linear in decoder.query_pos_head.layers:
        nn.init.xavier_uniform_(linear.weight)
    for project in model.decoder_input_proj:
        if not isinstance(project, nn.Identity):
            nn.init.xavier_uniform_(project[0].weight)


def _as_one_projection(attention: Any) -> None:
    """Query, key and value as torch's attention draws them: as one Xavier-uniform matrix."""
    width = attention.q_proj.in_features
    bound = (6 / (width + 3 * width)) ** 0.5
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(attention.o_proj.bias)


def _rays(attention: Any) -> Tensor:
    """Sampling points on a ray for each head, one step further for each point of a level."""
    angle = torch.arange(attention.n_heads) * (2 * torch.pi / attention.n_heads)
    ray = torch.stack([angle.cos(), angle.sin()], -1)
    ray = ray / ray.abs().amax(-1, keepdim=True)
    step = torch.cat([torch.arange(1, n + 1) for n in attention.num_points_list])
    return (ray[:, None] * step[None, :, None]).flatten()


def deploy(network: DFineNet, *, backbone: bool = True) -> DFineNet:
    """A copy for inference: what only training needs is gone, each convolution has its norm inside.

    Args:
        network: A trained network.
        backbone: Also fuse the backbone and the projections behind it and the encoder, which the
            official form leaves as they are.

    Returns:
        The same detections from fewer operations; it cannot be trained.
    """
    slim = copy.deepcopy(network).eval().requires_grad_(False)
    decoder = slim.model.decoder
    if slim.regression == "fdr":
        slim.bins = weighting(slim.config.max_num_bins, decoder.up, decoder.reg_scale)
    for heads in (decoder.class_embed, decoder.lqe_layers):
        for n in range(len(heads) - 1):
            heads[n] = nn.Identity()
    slim.model.denoising_class_embed = nn.Identity()
    modules: list[Any] = list(slim.modules())  # of transformers, known by the parts they have
    for module in modules:
        if hasattr(module, "conv") and hasattr(module, "norm"):
            module.conv, module.norm = fuse(module.conv, module.norm), nn.Identity()
        if backbone and hasattr(module, "convolution"):
            module.convolution = fuse(module.convolution, module.normalization)
            module.normalization = nn.Identity()
    for projects in (slim.model.encoder_input_proj, slim.model.decoder_input_proj):
        for n, project in enumerate(projects if backbone else ()):
            if not isinstance(project, nn.Identity):
                projects[n] = fuse(project[0], project[1])
    for module in modules:
        if hasattr(module, "bottlenecks"):
            for n, block in enumerate(module.bottlenecks):
                module.bottlenecks[n] = nn.Sequential(_one_convolution(block), block.activation)
    return slim


@torch.no_grad()
def fuse(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that does what a convolution and its batch norm do in evaluation.

    The frozen norm of the sizes L and X has no ``eps`` of its own: it is 1e-5.
    """
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight / (norm.running_var + getattr(norm, "eps", 1e-5)).sqrt()
    fused = nn.utils.skip_init(
        nn.Conv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
        conv.padding, groups=conv.groups, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    fused.weight.copy_(conv.weight * scale[:, None, None, None])
    fused.bias.copy_(norm.bias - norm.running_mean * scale)
    return fused.requires_grad_(False)


@torch.no_grad()
def _one_convolution(block: Any) -> nn.Conv2d:
    """The 3 × 3 convolution equal to a RepVGG block's 3 × 3 and 1 × 1 branches, both fused."""
    wide, narrow = block.conv1.conv, block.conv2.conv
    wide.weight += F.pad(narrow.weight, (1, 1, 1, 1))
    wide.bias += narrow.bias
    return wide
