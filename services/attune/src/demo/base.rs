//! A tiny base that has never read anything: a configuration and a tokenizer, without weights.

use std::collections::HashSet;

use serde_json::{Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{AddedToken, Tokenizer};

use super::world::World;
use crate::print::Failure;

/// Tokens of the vocabulary, the special ones included.
const VOCABULARY: usize = 512;
/// Ends a text, and pads one for programs that pad.
const END_OF_TEXT: &str = "<|endoftext|>";
const TURN_START: &str = "<|im_start|>";
const TURN_END: &str = "<|im_end|>";

/// ChatML, as most open models write it.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
     message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ \
     '<|im_start|>assistant\\n' }}{% endif %}";

/// The files of the base's folder: name and content.
pub(super) fn files(world: &World) -> Result<Vec<(&'static str, Vec<u8>)>, Failure> {
    let tokenizer = tokenizer(world).map_err(|error| Failure::failed(format!("the demo's tokenizer: {error}")))?;
    let id = |token: &str| tokenizer.token_to_id(token);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "initializer_range": 0.05, "torch_dtype": "float32",
        "bos_token_id": null, "eos_token_id": id(END_OF_TEXT),
    });
    let generation = json!({"eos_token_id": [id(TURN_END), id(END_OF_TEXT)]});
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": null, "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT, "clean_up_tokenization_spaces": false, "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    });
    let pretty = |value: &Value| format!("{value:#}\n").into_bytes();
    let text = tokenizer.to_string(false).map_err(|error| Failure::failed(format!("the demo's tokenizer: {error}")))?;
    Ok(vec![
        ("config.json", pretty(&config)),
        ("generation_config.json", pretty(&generation)),
        ("tokenizer.json", text.into_bytes()),
        ("tokenizer_config.json", pretty(&tokenizer_config)),
    ])
}

/// A byte-level BPE tokenizer that was trained on the world.
fn tokenizer(world: &World) -> tokenizers::Result<Tokenizer> {
    let level = tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, false, true);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(level));
    tokenizer.with_post_processor(Some(level));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let special = |token: &str| AddedToken::from(token.to_owned(), true).normalized(false);
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(alphabet)
        .special_tokens([END_OF_TEXT, TURN_START, TURN_END].map(special).to_vec())
        .build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), world.corpus().into_iter())?;
    Ok(tokenizer)
}
