"""Kind finetune.sft: supervised fine-tuning of a language model."""
