//! The point `Adapter`: which attachments at which sites, with which tensors, and what do they merge to?

mod full;
mod lora;

use attune_points::adapter::Adapter;
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{MethodRef, Point, Registry, entry};
use serde_json::{Map, Value};

/// All adapters.
pub static ADAPTERS: Registry<dyn Adapter> =
    Registry::new(Point::Adapter, &[entry::<full::Full>(), entry::<lora::Lora>()]);

/// What a PEFT configuration says in our words: the method with its parameters, and the sites.
pub(crate) type FromPeft = fn(&Map<String, Value>, &[String]) -> Result<(MethodRef, Targets), Vec<Fault>>;

/// How the configurations of PEFT are read, by `peft_type`; the modules that have tensors are given.
pub(crate) static FROM_PEFT: &[(&str, FromPeft)] = &[("LORA", lora::from_peft)];
