"""Models of `transformers`, small and of odd sizes, with random weights: built from configs, nothing is downloaded.

They bring what toy models lack: tied and shared weights, outputs that are objects, buffers, weights that are used
outside of their module's forward, a gradient that enters one block from many others, experts that get no token.
Sequence lengths differ between ranks and from batch to batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.references import Recipe, Record, losses_of
from tests.world.engine_runs import Config, rank

VOCAB, HIDDEN, HEADS, LAYERS, INNER, LABELS = 131, 48, 4, 3, 67, 5
IMAGE, PATCH = 24, 8
BATCH = 2
STEPS = 10
PAD, END = 0, 1


def seeded(kind: type[nn.Module], config: Any) -> nn.Module:
    """The same weights everywhere."""
    torch.manual_seed(3)
    return kind(config).train()


def build_gpt2() -> nn.Module:
    """The head is the embedding."""
    config = hf.GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=INNER,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return seeded(hf.GPT2LMHeadModel, config)


def build_bert() -> nn.Module:
    """A classifier: an embedding layer of three tables, blocks, a pooler, a head."""
    config = hf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
    )
    return seeded(hf.BertForSequenceClassification, config)


def build_llama() -> nn.Module:
    """Rotary frequencies are a buffer; two heads share one of the keys and values."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=64,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return seeded(hf.LlamaForCausalLM, config)


def build_t5() -> nn.Module:
    """One embedding for encoder, decoder and head; the first block's position bias goes into all the others."""
    config = hf.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )
    return seeded(hf.T5ForConditionalGeneration, config)


def build_mixtral() -> nn.Module:
    """All experts of a layer are one three-dimensional weight; some get no token."""
    config = hf.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        num_local_experts=7,
        num_experts_per_tok=2,
        experts_implementation="eager",
        output_router_logits=True,
        max_position_embeddings=64,
        bos_token_id=END,
        eos_token_id=END,
    )
    return seeded(hf.MixtralForCausalLM, config)


def build_switch() -> nn.Module:
    """Each expert is a module, held by a dictionary that is called; those without tokens are not called at all."""
    config = hf.SwitchTransformersConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=INNER,
        num_layers=2,
        num_heads=HEADS,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=11,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        decoder_start_token_id=PAD,
    )
    return seeded(hf.SwitchTransformersForConditionalGeneration, config)


def build_vit() -> nn.Module:
    """A class token and positions are bare parameters; patches come from a convolution."""
    config = hf.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=IMAGE,
        patch_size=PATCH,
        num_labels=LABELS,
    )
    return seeded(hf.ViTForImageClassification, config)


def build_resnet() -> nn.Module:
    """Convolutions and batch norms, whose running statistics are buffers of each rank."""
    config = hf.ResNetConfig(
        embedding_size=9, hidden_sizes=[13, 21], depths=[2, 2], layer_type="basic", num_labels=LABELS
    )
    return seeded(hf.ResNetForImageClassification, config)


def generator_of(index: int, rank: int) -> torch.Generator:
    """Random numbers of one micro-batch."""
    return torch.Generator().manual_seed(1000 * index + rank)


def ids(generator: torch.Generator, length: int) -> Tensor:
    """Tokens that are neither padding nor the end."""
    return torch.randint(2, VOCAB, (BATCH, length), generator=generator)


def causal(index: int, rank: int) -> dict[str, Tensor]:
    """Next tokens of a text."""
    text = ids(generator_of(index, rank), 5 + index % 4 + 3 * rank)
    return {"input_ids": text, "labels": text}


def few_tokens(index: int, rank: int) -> dict[str, Tensor]:
    """So few that no rank has one for each expert."""
    text = ids(generator_of(index, rank), 2)
    return {"input_ids": text, "labels": text}


def sequence_pair(index: int, rank: int) -> dict[str, Tensor]:
    """One text in, another one out."""
    generator = generator_of(index, rank)
    return {"input_ids": ids(generator, 4 + 2 * rank), "labels": ids(generator, 3 + index % 3)}


def few_token_pair(index: int, rank: int) -> dict[str, Tensor]:
    """So few that no rank has one for each expert."""
    generator = generator_of(index, rank)
    return {"input_ids": ids(generator, 3), "labels": ids(generator, 2)}


def labelled_text(index: int, rank: int) -> dict[str, Tensor]:
    """Text with padding, and its class."""
    generator = generator_of(index, rank)
    text = ids(generator, 6 + 2 * rank)
    mask = torch.ones_like(text)
    mask[0, -2:] = 0
    return {
        "input_ids": text * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, LABELS, (BATCH,), generator=generator),
    }


def labelled_images(index: int, rank: int) -> dict[str, Tensor]:
    """Images and their classes."""
    generator = generator_of(index, rank)
    images = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
    return {"pixel_values": images, "labels": torch.randint(0, LABELS, (BATCH,), generator=generator)}


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model itself computes."""
    loss: Tensor = model(**batch).loss
    return loss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As scripts write it; frozen parameters stay outside."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)


def build_gpt2_with_more_tokens() -> nn.Module:
    """A script added tokens: embedding and head are new parameters."""
    model: Any = build_gpt2()
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    return model


def build_gpt2_with_lora() -> nn.Module:
    """A frozen base and small trainable adapters beside it."""
    import peft  # slow, and not always there

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_fc"], lora_dropout=0.0)
    torch.manual_seed(4)
    model: nn.Module = peft.get_peft_model(build_gpt2(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)  # zeros would leave lora_A without a gradient
    return model


def recomputing(build: Callable[[], nn.Module], reentrant: bool) -> nn.Module:
    """The same model with gradient checkpointing."""
    model: Any = build()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


GPT2 = Recipe(build_gpt2, causal, loss_of, adamw, steps=STEPS)
BERT = Recipe(build_bert, labelled_text, loss_of, adamw, steps=STEPS)
LLAMA = Recipe(build_llama, causal, loss_of, adamw, steps=STEPS)
T5 = Recipe(build_t5, sequence_pair, loss_of, adamw, steps=STEPS)
MIXTRAL = Recipe(build_mixtral, few_tokens, loss_of, adamw, steps=STEPS)
SWITCH = Recipe(build_switch, few_token_pair, loss_of, adamw, steps=STEPS)
VIT = Recipe(build_vit, labelled_images, loss_of, adamw, steps=STEPS)
RESNET = Recipe(build_resnet, labelled_images, loss_of, adamw, steps=STEPS)


def json_of(stage: int, zero: Config | None = None, **others: Any) -> Config:
    """A DeepSpeed JSON."""
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
            **(zero or {}),
        },
        **others,
    }


def train(recipe: Recipe, accelerator: Any, model: Any, optimizer: Any) -> Record:
    """The loop of a script over what ``accelerator.prepare`` gave."""
    record = Record()
    for step in range(recipe.steps):
        for index in recipe.micro_batches(step):
            with accelerator.accumulate(model):
                losses = losses_of(recipe, model, index, rank())
                record.add_losses(losses)
                accelerator.backward(losses[0])
                optimizer.step()
                optimizer.zero_grad()
    record.weights = model.state_dict()
    return record
