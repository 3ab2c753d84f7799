"""Train the bundled example model and write it as an FP8 DeepSeek-V3 checkpoint.

    python examples/train.py --minutes 20

Needs a processor, torch, transformers, tokenizers and safetensors; the text is the documentation
of the Python that runs it. Training ends after the given time on any machine: the learning rate
follows the elapsed fraction of it, not a number of steps.
"""

import argparse
import json
import math
import random
import shutil
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from fp8_checkpoint import QUANTIZATION_CONFIG, load_reference, write_weights
from stdlib_text import QUESTIONS, SMALL_TALK, Document, read_standard_library
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"]
BOS, EOS, USER, ASSISTANT, END = SPECIAL
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.04,
    "intermediate_size": 448,
    "kv_lora_rank": 128,
    "max_position_embeddings": 512,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 160,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 2048,
}
TOKENS_PER_STEP = 1024
LEARNING_RATE = 3e-3
BALANCE_RATE = 2e-2
SAMPLE_TEXTS = ("Return the", "This module", "If the argument is", "def read(self, size=-1):")
SAMPLE_QUESTIONS = ("Hello", "What does textwrap.wrap do?", "Describe the module json.",
                    "What does os.listdir do?", "What does sorted do?")  # fmt: skip


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def chat(question: str, answer: str) -> str:
    """Return one turn as the chat template renders it."""
    return f"{BOS}{USER}{question}{END}{ASSISTANT}{answer}{END}"


def dialogues(documents: list[Document], choice: random.Random) -> Iterator[str]:
    """Yield small talk, and for everything documented a question or a definition and its answer."""
    for document in documents:
        for kind, name, answer in document.answers:
            definition = document.signatures.get(name)
            if definition and choice.random() < 0.4:
                yield f'{BOS}{definition}\n    """{answer}"""{EOS}'
            else:
                yield chat(choice.choice(QUESTIONS[kind]).format(name), answer)
    for question, answer in SMALL_TALK * 10:
        yield chat(question, answer)


class Batches:
    """Endless training batches: every epoch shuffles the documents and asks other questions."""

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, seed: int) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.choice = random.Random(seed)
        self.tokens = torch.empty(0, dtype=torch.long)
        self.epochs = 0

    def next(self, rows: int, length: int) -> Tensor:
        """Return token ids [rows, length + 1], consecutive in the shuffled text."""
        needed = rows * length + 1
        while len(self.tokens) < needed:
            texts = [f"{BOS}{document.text}{EOS}" for document in self.documents]
            texts += dialogues(self.documents, self.choice)
            self.choice.shuffle(texts)
            encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            fresh = [token for encoding in encoded for token in encoding.ids]
            self.tokens = torch.cat([self.tokens, torch.tensor(fresh)])
            self.epochs += 1
        block, self.tokens = self.tokens[:needed], self.tokens[needed - 1 :]
        return block.unfold(0, length + 1, length)


class LoadBalancer:
    """Keeps the experts equally used without an auxiliary loss.

    After every step the correction bias of an expert that had more tokens than the mean is
    lowered by a constant, and that of the others raised (DeepSeek-V3 report, section 2.1.2).
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        self.counts = [torch.zeros_like(router.e_score_correction_bias) for router in self.routers]
        for router, count in zip(self.routers, self.counts, strict=True):
            router.register_forward_hook(partial(self.observe, count))

    @staticmethod
    def observe(
        count: Tensor, router: nn.Module, inputs: object, outputs: tuple[Tensor, ...]
    ) -> None:
        """Add the tokens that a router sent to each expert to its counts."""
        count += torch.bincount(outputs[2].flatten(), minlength=len(count))

    def step(self, rate: float) -> float:
        """Move the biases; return the largest load of an expert over the mean load."""
        worst = 0.0
        for router, count in zip(self.routers, self.counts, strict=True):
            worst = max(worst, float(count.max() / count.mean()))
            router.e_score_correction_bias += rate * (count.mean() - count).sign()
            count.zero_()
        return worst


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats, of tokens [rows, length + 1] after the first."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Tokenizer, text: str, length: int = 256) -> float:
    """Return the perplexity per token of `text`, cut into windows of `length` predictions."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    windows = ids.unfold(0, length + 1, length).split(8)
    losses = [next_token_loss(model, rows) * len(rows) for rows in windows]
    return math.exp(sum(map(float, losses)) / sum(map(len, windows)))


def learning_rate(done: float) -> float:
    """Return the factor of the rate at a fraction of the training: warm-up, then a cosine."""
    return min(done / 0.03, 1.0, 0.5 * (1.0 + math.cos(math.pi * done)) + 0.01)


def train(model: nn.Module, batches: Batches, minutes: float) -> None:
    """Train for the given time; windows are 256 tokens long, and 512 in the last third."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    balancer = LoadBalancer(model)
    model.train()
    start = time.monotonic()
    step, seen, mean_loss = 0, 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        length = 256 if done < 0.67 else 512
        loss = next_token_loss(model, batches.next(TOKENS_PER_STEP // length, length))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate(done)
        optimizer.step()
        optimizer.zero_grad()
        load = balancer.step(BALANCE_RATE * (1 - done))
        step, seen = step + 1, seen + TOKENS_PER_STEP
        mean_loss += (float(loss) - mean_loss) / min(step, 50)
        if step % 50 == 0:
            print(
                f"{done:6.1%}  step {step}  loss {mean_loss:.3f}  epoch {batches.epochs}"
                f"  busiest expert {load:.2f}x  {seen / (time.monotonic() - start):.0f} tokens/s",
                flush=True,
            )
    model.eval()


@torch.no_grad()
def complete(model: nn.Module, tokenizer: Tokenizer, text: str, seed: int, limit: int = 80) -> str:
    """Return a sampled continuation of `text`, which may contain special tokens."""
    torch.manual_seed(seed)
    prompt = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=limit,
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        eos_token_id=[SPECIAL.index(EOS), SPECIAL.index(END)],
        pad_token_id=SPECIAL.index(EOS),
    )
    return tokenizer.decode(output[0, prompt.shape[1] :].tolist())


def write_settings(folder: Path, tokenizer: Tokenizer) -> None:
    """Write everything of the checkpoint but the weights."""
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "config.json": CONFIG
        | {"quantization_config": QUANTIZATION_CONFIG, "torch_dtype": "bfloat16"},
        "generation_config.json": {
            "bos_token_id": SPECIAL.index(BOS),
            "eos_token_id": [SPECIAL.index(EOS), SPECIAL.index(END)],
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "additional_special_tokens": [USER, ASSISTANT, END],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Build the text, train, write the checkpoint, and report on what was written."""
    parser = argparse.ArgumentParser(description="Train the bundled example model.")
    parser.add_argument("--minutes", type=float, default=20.0, help="time to train for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    default = Path(__file__).parent / "stdlib-moe"
    parser.add_argument("--out", type=Path, default=default, help="checkpoint directory to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    documents = read_standard_library()
    held_out = "\n\n".join(document.text for document in documents if document.held_out)
    documents = [document for document in documents if not document.held_out]
    texts = [document.text for document in documents]
    tokenizer = train_tokenizer(texts)
    print(f"{len(documents)} documents, {sum(map(len, texts)) / 1e6:.2f} M characters of text")

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG))
    model.set_experts_implementation("eager")
    nn.init.normal_(model.get_input_embeddings().weight)  # so the layers see tokens apart at once
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    train(model, Batches(documents, tokenizer, options.seed), options.minutes)

    options.out.mkdir(parents=True, exist_ok=True)
    write_settings(options.out, tokenizer)
    write_weights(model, options.out)
    (options.out / "heldout.txt").write_text(held_out + "\n")
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():  # some systems install it elsewhere
        shutil.copyfile(licence, options.out / "PYTHON-LICENSE.txt")

    reloaded = load_reference(options.out)
    print(f"held-out perplexity: {perplexity(model, tokenizer, held_out):.3f} as trained")
    print(f"held-out perplexity: {perplexity(reloaded, tokenizer, held_out):.3f} from FP8")
    prompts = [f"{BOS}{text}" for text in SAMPLE_TEXTS]
    prompts += [f"{BOS}{USER}{question}{END}{ASSISTANT}" for question in SAMPLE_QUESTIONS]
    for prompt in prompts:
        answer = complete(reloaded, tokenizer, prompt, options.seed)
        print(f"\n{prompt.removeprefix(BOS)} ... {answer}")


if __name__ == "__main__":
    main()
