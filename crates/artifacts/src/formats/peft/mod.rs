//! LoRA adapters in Hugging Face PEFT's layout: `adapter_config.json`, `adapter_model.safetensors`, and the folder that
//! holds both. Follows what peft 0.21.2 writes.

mod config;
mod folder;
mod names;
mod patterns;

pub use config::{CONFIG_FILE, InitWeights, Layers, LoraConfig, Modules, PEFT_VERSION, is_hub_id};
pub use folder::{CARD_FILE, WEIGHTS_FILE, read_folder, write_folder};
pub use names::{Factor, PREFIX, parse_tensor_name, tensor_name};
pub use patterns::Patterns;
