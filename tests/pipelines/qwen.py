"""A tiny Qwen3 as text encoder, and a tokenizer of single characters that knows a chat."""

from typing import Any

from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.pipelines.parts import ALPHABET

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer(template: str = _TEMPLATE) -> Qwen2Tokenizer:
    """One token for each character, in which "Ġ" is a space and "Ċ" a new line; it writes chats by a template."""
    tokens = [*ALPHABET, "Ġ", "Ċ", *_SPECIAL]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    found = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=list(_SPECIAL[1:]), model_max_length=2048)
    found.chat_template = template
    return found


def sizes(layers: int, width: int) -> dict[str, Any]:
    """A language model's configuration: of the tokenizer's vocabulary, with so many layers of so many channels."""
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def qwen3(layers: int, width: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**sizes(layers, width))).eval()
