"""CONTRACT: how a conversation becomes token ids, and which of them are learned.

    ids    <|user|> Hi <|end|> <|assistant|> Hello ! <|end|>
    mask      0     0    0          0          1   1    1

A turn is `[<|role|>, content..., <|end|>]`; the content is encoded by itself, so that text never becomes
a control token. Invariant: `encode_prompt` of the turns so far is a prefix of `encode_chat` of the whole,
so a model is always prompted with ids as it was trained on. Nothing is shifted: `GPT2LMHeadModel` does.
Training, chat, evaluation and the server all call this module; nobody else spells the format.
"""

from firstwords.schema import Message
from firstwords.tokenizer import Tokenizer

# The same format for other programs (transformers, TRL, servers). It cannot protect itself against text
# that spells a control token; our own code never renders it. The `generation` block marks the mask.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# For readers that know no `generation` block; what it renders is the same.
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

# For Ollama, whose templates are Go's.
OLLAMA_TEMPLATE = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"

# For people, in a model card.
DESCRIPTION = """\
A turn is `<|role|>`, the text, `<|end|>`; the role is `system` (once, first, optional), `user` or
`assistant`. A prompt ends with `<|assistant|>`, and the model ends its reply with `<|end|>`. Nothing stands
in front.

```text
<|user|>Hi<|end|><|assistant|>Hello!<|end|>
```

The chat template does this. It cannot tell a control token from a user's text that spells one: programs that
take text from strangers must encode each text by itself with `split_special_tokens=True`, as firstwords does
in its way."""


def encode_chat(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Encode a whole conversation, with a mask of the tokens that the model learns to say.

    Args:
        messages: turns in order, as `schema.parse_conversation` returns them.
        tokenizer: encodes the contents and names the control ids.

    Returns:
        `(ids, mask)`, both of length L. `mask[i]` is 1 where `ids[i]` is learned: the content of each
        assistant turn and the `<|end|>` that closes it. Without that `<|end|>` no model learns to stop.
    """
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        turn = _encode_turn(message, tokenizer)
        ids += turn
        # The role token comes from the prompt, never from the model: it is not learned.
        mask += [0] + [int(message.role == "assistant")] * (len(turn) - 1)
    return ids, mask


def encode_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """Encode the turns so far and open the assistant's.

    Args:
        messages: turns in order, the last one the user's.
        tokenizer: as in `encode_chat`.

    Returns:
        ids of length L, the last of them `<|assistant|>`.
    """
    ids = [i for message in messages for i in _encode_turn(message, tokenizer)]
    return [*ids, tokenizer.role_id("assistant")]


def _encode_turn(message: Message, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.role_id(message.role), *tokenizer.encode(message.content), tokenizer.end_id]
