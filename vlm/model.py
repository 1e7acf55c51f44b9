"""The model: encoder -> connector -> tiles -> splice -> decoder -> loss."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.utils.generic import ModelOutput

from vlm.composition import to_plain
from vlm.config import links
from vlm.configuration import VLMConfig
from vlm.connectors.base import Connector
from vlm.encoders.base import Encoder
from vlm.errors import CheckpointError, ConfigurationError, listed
from vlm.features import Features, ImageInput
from vlm.initial import first_values, gathered
from vlm.llm import decoder as decoders
from vlm.llm.base import AdaptationSpec, beside, check_claims, check_order
from vlm.llm.context import Auxiliary, Keys, TokenContext
from vlm.llm.head import finish_logits
from vlm.row import IGNORE
from vlm.splice import put_features, type_from_ids
from vlm.tiles import Newline, assemble

__all__ = ["VLM", "VLMOutput"]


@dataclass
class VLMOutput(ModelOutput):
    """What a pass gives.

    loss_sum: summed cross entropy of the supervised tokens (float32, a scalar). count: how many. document_losses, document_counts: the same per document, without a graph.
    auxiliary: losses by name and layer. logits: (B, S, V), only where they were asked for.
    loss = loss_sum / count + the auxiliary losses over this call's units, as users of Auto classes expect.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_sum: Tensor | None = None
    count: Tensor | None = None
    document_losses: Tensor | None = None
    document_counts: Tensor | None = None
    auxiliary: dict[tuple[str, int], Auxiliary] | None = None
    past_key_values: Any = None
    context: TokenContext | None = None


class VLM(PreTrainedModel, GenerationMixin):
    """A vision-language model of exchangeable parts. Parameters live under `encoder.`, `connector.NAME.` (in the order of the chain), `newline.` (where it has one) and `llm.`."""

    config_class = VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        spec = config.spec()
        self.spec = spec
        self.encoder: Encoder = spec.encoder.build()
        self.chain = links(spec.encoder, spec.connector, config.text_config.hidden_size)
        self.reads = self.chain[0][0].reads(self.chain[0][1])
        self.connector = nn.ModuleDict({link_name(index, part.use): part.build(spec.encoder, link) for index, (part, link) in enumerate(self.chain)})
        self.llm: PreTrainedModel = decoders.build_decoder(config.text_config)
        for adaptation in decoders.in_order(list(spec.adapt.values())):
            adaptation.build(self.part(adaptation), decoders.scope(self.llm))
            adaptation.release(self.part(adaptation))
        self.newline = Newline(config.text_config.hidden_size) if spec.newline else None  # last, as in a model that it is added to: the optimizer goes by order
        self.name_tied()
        self.post_init()

    # ---- the data's way ------------------------------------------------------------------------------------------------

    def see(self, images: Sequence[ImageInput]) -> Features:
        """Pictures -> packed features of the decoder's width. A frozen encoder runs without a graph."""
        images = [image.to(self.device, self.dtype) for image in images]
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = self.encoder([piece for image in images for piece in image.pieces()], self.reads)
        for part in self.parts():
            features = part(features)
        return (self.newline or assemble)(features, [image.cut for image in images])

    def parts(self) -> list[Connector]:
        """The links of the connector chain, in order."""
        return cast("list[Connector]", list(self.connector.values()))

    def embed(self, input_ids: Tensor, vision: Tensor, images: Sequence[ImageInput] | None) -> Tensor:
        """(B, S, D): text embeddings with the pictures' features among them. One embedding call and, while training, one encoder call whatever the rows hold."""
        embeddings = self.llm.get_input_embeddings()(input_ids)
        if images:
            return put_features(embeddings, self.see(images).tokens, vision)
        if self.training:
            return put_features(embeddings, self.see([self._dummy(embeddings)]).tokens, vision, dummy=True)
        return put_features(embeddings, embeddings.new_empty(0, embeddings.shape[-1]), vision)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Sequence[ImageInput] | None = None,
        mm_token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        picture_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        documents: int | None = None,
        plain: bool = False,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> VLMOutput:
        """One pass over rows of one or several documents.

        Args:
            input_ids: (B, S), the placeholder id once per picture token. inputs_embeds: (B, S, D) instead of it, pictures already in.
            attention_mask: (B, P + S), 1 = token, 0 = padding; P cached tokens.
            labels: (B, S), -100 where nothing is supervised. images: pictures in reading order, row by row.
            mm_token_type_ids: (B, S), 0 text, 1 picture; default: where the placeholder stands. document_ids: (B, S), -1 = padding; default: one document per row.
            documents: how many there are, known on the host; default: one per row. picture_ids, branch_ids: (B, S), see TokenContext. plain: known on the host: every row is one document, padded on the right or not at all, so that causality alone is the mask. position_ids: (B, S), restarting per document.
            logits_to_keep: logits of the last so many positions, 0 for all; default: all without labels, none with them.
        """
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if mm_token_type_ids is None and input_ids is not None and not past:
            mm_token_type_ids = type_from_ids(input_ids, self.config.image_token_id)
        if inputs_embeds is None:
            assert input_ids is not None
            if past or mm_token_type_ids is None:  # behind a cache there is text only
                inputs_embeds = cast(Tensor, self.get_input_embeddings()(input_ids))
            else:
                inputs_embeds = self.embed(input_ids, mm_token_type_ids == 1, images)
        context = self.context(inputs_embeds, past, attention_mask, position_ids, mm_token_type_ids, document_ids, picture_ids, branch_ids, bool(images), plain)
        output = decoders.stack(self.llm)(
            inputs_embeds=inputs_embeds,
            attention_mask=context.attention(None)["attention_mask"],
            position_ids=context.position,
            past_key_values=past_key_values,
            use_cache=bool(use_cache) if use_cache is not None else past_key_values is not None,
            context=context,
        )
        hidden = output.last_hidden_state
        result = VLMOutput(past_key_values=output.past_key_values, context=context)
        if labels is not None:
            self._add_loss(result, hidden, labels, documents if documents is not None else len(labels))
        if labels is None or logits_to_keep is not None:
            result.logits = finish_logits(self.get_output_embeddings()(hidden[:, -(logits_to_keep or 0) :]), self.config.text_config)
        return result

    def context(
        self,
        embeddings: Tensor,
        past: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        types: Tensor | None,
        document_ids: Tensor | None,
        picture_ids: Tensor | None,
        branch_ids: Tensor | None,
        has_vision: bool,
        plain: bool,
    ) -> TokenContext:
        """The facts of this call's tokens, completed where the caller left some out."""
        rows, length = embeddings.shape[:2]
        device = embeddings.device
        attention = str(self.llm.config._attn_implementation)
        if document_ids is not None and not plain:
            decoders.check_attention(self.llm.config, attention)
        if branch_ids is not None and decoders.is_varlen(attention):
            raise ConfigurationError("independent questions need a mask that flash attention cannot express", got=f"llm.attention {attention}", cure="set llm.attention: sdpa")
        index = torch.arange(past, past + length, device=device).expand(rows, -1)
        plain = past == 0 and (plain or (branch_ids is None and attention_mask is None and document_ids is None))
        whole = attention_mask if attention_mask is not None else torch.ones(rows, past + length, dtype=torch.int64, device=device)
        key_document = whole.to(torch.int64) * torch.arange(1, rows + 1, device=device)[:, None] - 1  # 1 -> the row's document, 0 -> padding (-1)
        if document_ids is not None:
            key_document = torch.cat([key_document[:, :past], document_ids], 1)
        key_position = (whole.cumsum(1) - 1).clamp(min=0)
        if position_ids is None:
            position_ids = key_position[:, past:]
        zeros = torch.zeros_like(key_document)
        keys = Keys(
            key_document,
            zeros if branch_ids is None else torch.cat([zeros[:, :past], branch_ids], 1),
            torch.cat([key_position[:, :past], position_ids.expand(rows, -1)], 1),
        )
        return TokenContext(
            type=types if types is not None else zeros[:, past:],
            document=keys.document[:, past:],
            picture=picture_ids if picture_ids is not None else torch.full_like(index, -1),
            branch=keys.branch[:, past:],
            order=index,
            position=keys.position[:, past:],
            keys=keys,
            plain=plain,
            has_vision=has_vision,
            additive=attention == "eager",
            varlen=decoders.is_varlen(attention),
            dtype=embeddings.dtype,
        )

    def _add_loss(self, result: VLMOutput, hidden: Tensor, labels: Tensor, documents: int) -> None:
        targets = labels[:, 1:]
        supervised = targets != IGNORE
        losses = self.get_output_embeddings()(hidden[:, :-1][supervised], targets[supervised])
        loss_sum, count = losses.sum(), supervised.sum()
        result.loss_sum, result.count = loss_sum, count
        assert result.context is not None
        document = result.context.document[:, 1:][supervised]
        result.document_losses = losses.new_zeros(documents).index_add_(0, document, losses.detach())
        result.document_counts = torch.zeros(documents, dtype=torch.int64, device=labels.device).index_add_(0, document, torch.ones_like(document))
        result.auxiliary, units = result.context.losses, result.context.units() if result.context.losses else {}
        extra = [one.coefficient * one.sum / units[one.unit].clamp(min=1) for one in result.auxiliary.values()]
        result.loss = sum(extra, loss_sum / count.clamp(min=1))

    def _dummy(self, like: Tensor) -> ImageInput:
        return self.spec.encoder.dummy().to(like.device, like.dtype)

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, images: Sequence[ImageInput] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' generate over left-padded rows (as `VLMProcessor.__call__` makes them); returns the new tokens only, (B, T).

        Pictures are encoded once, so beams and sampling repeat embeddings, not pictures. Without a cache (use_cache=False) every step sees ids and pictures again.
        """
        assert input_ids is not None
        kwargs |= self._never_said(kwargs)
        types = kwargs.pop("mm_token_type_ids", None)
        types = type_from_ids(input_ids, self.config.image_token_id) if types is None else types
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        common: dict[str, Any] = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "mm_token_type_ids": types, **kwargs}
        if kwargs.get("use_cache", True) is False:
            whole = GenerationMixin.generate(cast(Any, self), input_ids=input_ids, images=images, **common)  # type: ignore[attr-defined]
            return whole[:, input_ids.shape[1] :] if isinstance(whole, Tensor) else whole
        return GenerationMixin.generate(cast(Any, self), inputs_embeds=self.embed(input_ids, types == 1, images), **common)  # type: ignore[attr-defined]

    def _never_said(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`suppress_tokens` as a mask made once: transformers looks the ids up in every step, and there are thousands of a padded vocabulary."""
        settings = copy.copy(kwargs.get("generation_config") or self.generation_config)
        named, settings.suppress_tokens = kwargs.pop("suppress_tokens", None) or settings.suppress_tokens, []  # None would be filled in from the model's own
        if not named:
            return {}
        mask = torch.zeros(self.config.text_config.vocab_size, dtype=torch.bool)
        mask[list(named)] = True
        return {"generation_config": settings, "logits_processor": LogitsProcessorList([_Never(mask.to(self.device)), *(kwargs.get("logits_processor") or ())])}

    # ---- what transformers asks of a model -----------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return decoders.output_embeddings(self.llm)

    def initialize_weights(self) -> None:
        """Make the buffers that no file holds. First values of parameters are given by loading.py, once, part by part; transformers must not draw them again (feasibility section 4)."""
        for parameter in self.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        super().initialize_weights()

    def name_tied(self) -> None:
        """Tell transformers which tensors are one. Called again when a module with such a tensor got another name."""
        self._tied_weights_keys = {f"llm.{key}": f"llm.{value}" for key, value in self.llm.get_expanded_tied_weights_keys().items()}
        self.all_tied_weights_keys = dict(self._tied_weights_keys)

    def part(self, adaptation: AdaptationSpec) -> nn.Module:
        """The module that an adaptation changes."""
        return cast(nn.Module, getattr(self, adaptation.part))

    def add(self, name: str, adaptation: AdaptationSpec) -> None:
        """Build an adaptation into its part of a model whose weights are loaded, and give its first values. Raises ConfigurationError where it gets in the way of one that is there."""
        together = {**self.spec.adapt, name: adaptation}
        check_order(together)
        check_claims({known: spec.plan(self.config.text_config) for known, spec in together.items()})
        part = self.part(adaptation)
        adaptation.build(part, decoders.scope(self.llm))
        with gathered(part.parameters()):
            adaptation.initialise(part)
        if file := adaptation.projector():
            from vlm.loading import load_connector

            load_connector(self.parts()[0], self.spec.connector.use, file)
        self.config.adapt = {**self.config.adapt, name: to_plain(adaptation.form())}
        self.spec = self.config.spec()
        self.name_tied()

    def add_newline(self) -> None:
        """Give a model whose weights are loaded the token that ends a row of tiles, where it has none."""
        if self.newline is None:
            self.newline = Newline(self.config.text_config.hidden_size).to(self.device, self.dtype)
            first_values(self.newline, self.newline.reset_parameters)
            self.config.newline = True
            self.spec = self.config.spec()

    def add_all(self, adaptations: Mapping[str, AdaptationSpec]) -> None:
        """Add several, in the order in which a checkpoint's model is built."""
        for name, adaptation in sorted(adaptations.items(), key=lambda item: item[1].order):
            self.add(name, adaptation)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter of the model under one path: encoder..., connector.NAME..., llm...."""
        own: dict[str, dict[str, list[nn.Parameter]]] = {
            "encoder": self.encoder.groups(),
            "connector": {f"{name}.{path}".rstrip("."): found for name, link in zip(self.connector, self.parts(), strict=True) for path, found in link.groups().items()}
            | ({"newline": list(self.newline.parameters())} if self.newline is not None else {}),
            "llm": decoders.groups(self.llm),
        }
        adaptations = decoders.in_order(list(self.spec.adapt.values()))
        whole = {part: beside(groups, [spec.groups(self.part(spec)) for spec in adaptations if spec.part == part]) for part, groups in own.items()}
        return {f"{part}.{path}".rstrip("."): found for part, groups in whole.items() for path, found in groups.items() if found}

    def unused(self) -> list[nn.Parameter]:
        """Parameters kept for a checkpoint's sake: no gradient ever reaches them."""
        return [*self.encoder.unused(self.reads), *(p for part in self.parts() for p in part.unused())]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing, unexpected or mis-shaped key is a CheckpointError."""
        wanted = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, by name
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        problems = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(name)}
        if problems:
            raise CheckpointError(
                f"weights of {args[0] if args else '?'} do not fit the model",
                got="; ".join(f"{len(keys)} {name.replace('_', ' ')} ({listed(keys)})" for name, keys in problems.items()),
                expected="every key of the model once, in its shape",
                cure="load them into the model that its config.json describes",
            )
        return (model, info) if wanted else model


class _Never(LogitsProcessor):
    """Tokens that are not generated. mask: (V,) bool."""

    def __init__(self, mask: Tensor):
        self.mask = mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return scores.masked_fill(self.mask, -torch.inf)


def link_name(index: int, use: str) -> str:
    """Name of a link of the connector chain: its part's name, numbered where it is not the first of the chain."""
    return use if index == 0 else f"{use}_{index}"
