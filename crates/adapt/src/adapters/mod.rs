//! The point `Adapter`: which attachments at which sites, with which tensors, and what do they merge to?

mod abba;
mod adapterfusion;
mod bone;
mod bottleneck;
mod compacter;
mod delora;
mod dora;
mod full;
mod gralora;
mod hira;
mod loha;
mod lokr;
mod lora;
mod loramoe;
mod mora;
mod prefix_tuning;
mod randlora;
mod vera;

use attune_points::adapter::Adapter;
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{MethodRef, Point, Registry, entry};
use serde_json::{Map, Value};

use crate::parts::own;

/// All adapters.
pub static ADAPTERS: Registry<dyn Adapter> = Registry::new(
    Point::Adapter,
    &[
        entry::<abba::Abba>(),
        entry::<adapterfusion::Adapterfusion>(),
        entry::<bone::Bone>(),
        entry::<bottleneck::Bottleneck>(),
        entry::<compacter::Compacter>(),
        entry::<delora::Delora>(),
        entry::<dora::Dora>(),
        entry::<full::Full>(),
        entry::<gralora::Gralora>(),
        entry::<hira::Hira>(),
        entry::<loha::Loha>(),
        entry::<lokr::Lokr>(),
        entry::<lora::Lora>(),
        entry::<loramoe::Loramoe>(),
        entry::<mora::Mora>(),
        entry::<prefix_tuning::PrefixTuning>(),
        entry::<randlora::Randlora>(),
        entry::<vera::Vera>(),
    ],
);

/// How configurations in PEFT's layout are read.
pub(crate) struct FromPeft {
    /// Their `peft_type`; none for any.
    pub(crate) peft_type: Option<&'static str>,
    /// Whether one of this type is the method's; the first that says so has it.
    pub(crate) claims: fn(&Map<String, Value>) -> bool,
    /// What it says in our words: the method with its parameters, and the sites. The modules that have tensors are given.
    pub(crate) read: fn(&Map<String, Value>, &[String]) -> Read,
}

/// A method with its parameters and the sites of a configuration.
type Read = Result<(MethodRef, Targets), Vec<Fault>>;

/// How the configurations of PEFT are read.
pub(crate) static FROM_PEFT: &[FromPeft] = &[
    FromPeft { peft_type: None, claims: own::is_own, read: own::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: dora::is_dora, read: dora::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: |_| true, read: lora::from_peft },
    FromPeft { peft_type: Some("LOHA"), claims: |_| true, read: loha::from_peft },
    FromPeft { peft_type: Some("LOKR"), claims: |_| true, read: lokr::from_peft },
    FromPeft { peft_type: Some("HIRA"), claims: |_| true, read: hira::from_peft },
    FromPeft { peft_type: Some("MISS"), claims: |_| true, read: bone::from_peft },
    FromPeft { peft_type: Some("GRALORA"), claims: |_| true, read: gralora::from_peft },
    FromPeft { peft_type: Some("DELORA"), claims: |_| true, read: delora::from_peft },
    FromPeft { peft_type: Some("VERA"), claims: |_| true, read: vera::from_peft },
    FromPeft { peft_type: Some("RANDLORA"), claims: |_| true, read: randlora::from_peft },
    FromPeft { peft_type: Some("PREFIX_TUNING"), claims: |_| true, read: prefix_tuning::from_peft },
];
