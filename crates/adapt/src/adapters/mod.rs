//! The point `Adapter`: which attachments at which sites, with which tensors, and what do they merge to?

mod abba;
mod adalora;
mod adamss;
mod adapterfusion;
mod adaption_prompt;
mod alora;
mod arrow;
mod bbtv2;
mod bdlora;
mod beft;
mod boft;
mod bone;
mod bottleneck;
mod c3a;
mod capaboost;
mod cartridge;
mod chain_of_lora;
mod clover;
mod compacter;
mod connected_adapter;
mod context_aware_prompt;
mod deft;
mod delora;
mod dora;
mod dsee;
mod elastic_lora;
mod flora_tucker;
mod fourierft;
mod frod;
mod full;
mod glora;
mod gralora;
mod hira;
mod hra;
mod ia3;
mod kasa;
mod lily;
mod ln_tuning;
mod loha;
mod lokr;
mod loldu;
mod lora;
mod loramoe;
mod lorma;
mod lotr;
mod modules_to_save;
mod monteclora;
mod mora;
mod multitask_prompt_tuning;
mod nora;
mod oft;
mod osf;
mod p_tuning;
mod peanut;
mod poet;
mod poly;
mod prefix_tuning;
mod prompt_tuning;
mod psoft;
mod pvera;
mod qalora;
mod randlora;
mod road;
mod roselora;
mod selective_lora;
mod shira;
mod sltrain;
mod spectral_ft;
mod spiel;
mod supertuning;
mod svft;
mod taps;
mod tinylora;
mod trainable_tokens;
mod unilora;
mod vblora;
mod vectorfit;
mod vera;
mod waveft;
mod xlora;

use std::collections::BTreeMap;

use attune_points::TensorSpec;
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
        entry::<adalora::Adalora>(),
        entry::<adamss::Adamss>(),
        entry::<adapterfusion::Adapterfusion>(),
        entry::<adaption_prompt::AdaptionPrompt>(),
        entry::<alora::Alora>(),
        entry::<arrow::Arrow>(),
        entry::<bbtv2::Bbtv2>(),
        entry::<bdlora::Bdlora>(),
        entry::<beft::Beft>(),
        entry::<boft::Boft>(),
        entry::<bone::Bone>(),
        entry::<bottleneck::Bottleneck>(),
        entry::<c3a::C3a>(),
        entry::<capaboost::Capaboost>(),
        entry::<cartridge::Cartridge>(),
        entry::<chain_of_lora::ChainOfLora>(),
        entry::<clover::Clover>(),
        entry::<compacter::Compacter>(),
        entry::<connected_adapter::ConnectedAdapter>(),
        entry::<context_aware_prompt::ContextAwarePrompt>(),
        entry::<deft::Deft>(),
        entry::<delora::Delora>(),
        entry::<dora::Dora>(),
        entry::<dsee::Dsee>(),
        entry::<elastic_lora::ElasticLora>(),
        entry::<flora_tucker::FloraTucker>(),
        entry::<fourierft::Fourierft>(),
        entry::<frod::Frod>(),
        entry::<full::Full>(),
        entry::<glora::Glora>(),
        entry::<gralora::Gralora>(),
        entry::<hira::Hira>(),
        entry::<hra::Hra>(),
        entry::<ia3::Ia3>(),
        entry::<kasa::Kasa>(),
        entry::<lily::Lily>(),
        entry::<ln_tuning::LnTuning>(),
        entry::<loha::Loha>(),
        entry::<lokr::Lokr>(),
        entry::<loldu::Loldu>(),
        entry::<lora::Lora>(),
        entry::<loramoe::Loramoe>(),
        entry::<lorma::Lorma>(),
        entry::<lotr::Lotr>(),
        entry::<modules_to_save::ModulesToSave>(),
        entry::<monteclora::Monteclora>(),
        entry::<mora::Mora>(),
        entry::<multitask_prompt_tuning::MultitaskPromptTuning>(),
        entry::<nora::Nora>(),
        entry::<oft::Oft>(),
        entry::<osf::Osf>(),
        entry::<p_tuning::PTuning>(),
        entry::<peanut::Peanut>(),
        entry::<poet::Poet>(),
        entry::<poly::Poly>(),
        entry::<prefix_tuning::PrefixTuning>(),
        entry::<prompt_tuning::PromptTuning>(),
        entry::<psoft::Psoft>(),
        entry::<pvera::Pvera>(),
        entry::<qalora::Qalora>(),
        entry::<randlora::Randlora>(),
        entry::<road::Road>(),
        entry::<roselora::Roselora>(),
        entry::<selective_lora::SelectiveLora>(),
        entry::<shira::Shira>(),
        entry::<sltrain::Sltrain>(),
        entry::<spectral_ft::SpectralFt>(),
        entry::<spiel::Spiel>(),
        entry::<supertuning::Supertuning>(),
        entry::<svft::Svft>(),
        entry::<taps::Taps>(),
        entry::<tinylora::Tinylora>(),
        entry::<trainable_tokens::TrainableTokens>(),
        entry::<unilora::Unilora>(),
        entry::<vblora::Vblora>(),
        entry::<vectorfit::Vectorfit>(),
        entry::<vera::Vera>(),
        entry::<waveft::Waveft>(),
        entry::<xlora::Xlora>(),
    ],
);

/// What trains modules whole that are kept beside an adapter, and these modules.
pub(crate) fn saved(modules: Vec<String>) -> (MethodRef, Targets) {
    modules_to_save::of(modules)
}

/// What `target_modules` says of an adapter that has nothing but saved modules.
pub(crate) fn nowhere() -> Value {
    modules_to_save::nowhere()
}

/// The method of [`of_ranks`].
pub(crate) const OF_RANKS: &str = <lora::Lora as attune_spec::method::Method>::CARD.name;

/// LoRA of these ranks at these sites, and 1 as the factor on its products.
pub(crate) fn of_ranks(ranks: BTreeMap<String, u32>) -> Box<dyn Adapter> {
    Box::new(lora::Lora::of_ranks(ranks))
}

/// Whether a tensor of such a component is the factor that reads what comes in.
pub(crate) fn reads(spec: &TensorSpec) -> bool {
    lora::reads(spec)
}

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
    FromPeft { peft_type: Some("ADALORA"), claims: |_| true, read: adalora::from_peft },
    FromPeft { peft_type: Some("ADAMSS"), claims: |_| true, read: adamss::from_peft },
    FromPeft { peft_type: Some("ADAPTION_PROMPT"), claims: |_| true, read: adaption_prompt::from_peft },
    FromPeft { peft_type: Some("BEFT"), claims: |_| true, read: beft::from_peft },
    FromPeft { peft_type: Some("BOFT"), claims: |_| true, read: boft::from_peft },
    FromPeft { peft_type: Some("C3A"), claims: |_| true, read: c3a::from_peft },
    FromPeft { peft_type: Some("CARTRIDGE"), claims: |_| true, read: cartridge::from_peft },
    // Rows without their bounds.
    FromPeft { peft_type: Some("CPT"), claims: |_| true, read: prompt_tuning::from_peft },
    FromPeft { peft_type: Some("DEFT"), claims: |_| true, read: deft::from_peft },
    FromPeft { peft_type: Some("DELORA"), claims: |_| true, read: delora::from_peft },
    FromPeft { peft_type: Some("FOURIERFT"), claims: |_| true, read: fourierft::from_peft },
    FromPeft { peft_type: Some("GLORA"), claims: |_| true, read: glora::from_peft },
    FromPeft { peft_type: Some("GRALORA"), claims: |_| true, read: gralora::from_peft },
    FromPeft { peft_type: Some("HIRA"), claims: |_| true, read: hira::from_peft },
    FromPeft { peft_type: Some("HRA"), claims: |_| true, read: hra::from_peft },
    FromPeft { peft_type: Some("IA3"), claims: |_| true, read: ia3::from_peft },
    FromPeft { peft_type: Some("LILY"), claims: |_| true, read: lily::from_peft },
    FromPeft { peft_type: Some("LN_TUNING"), claims: |_| true, read: ln_tuning::from_peft },
    FromPeft { peft_type: Some("LOHA"), claims: |_| true, read: loha::from_peft },
    FromPeft { peft_type: Some("LOKR"), claims: |_| true, read: lokr::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: kasa::is_kasa, read: kasa::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: dora::is_dora, read: dora::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: bdlora::is_bdlora, read: bdlora::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: monteclora::is_monteclora, read: monteclora::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: qalora::is_qalora, read: qalora::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: alora::is_alora, read: alora::from_peft },
    FromPeft { peft_type: Some("LORA"), claims: |_| true, read: lora::from_peft },
    FromPeft { peft_type: Some("MISS"), claims: |_| true, read: bone::from_peft },
    FromPeft { peft_type: Some("MULTITASK_PROMPT_TUNING"), claims: |_| true, read: multitask_prompt_tuning::from_peft },
    FromPeft { peft_type: Some("OFT"), claims: |_| true, read: oft::from_peft },
    FromPeft { peft_type: Some("OSF"), claims: |_| true, read: osf::from_peft },
    FromPeft { peft_type: Some("PEANUT"), claims: |_| true, read: peanut::from_peft },
    FromPeft { peft_type: Some("POLY"), claims: |_| true, read: poly::from_peft },
    FromPeft { peft_type: Some("PREFIX_TUNING"), claims: |_| true, read: prefix_tuning::from_peft },
    // A file has the rows, and no longer what made them.
    FromPeft { peft_type: Some("P_TUNING"), claims: |_| true, read: prompt_tuning::from_peft },
    FromPeft { peft_type: Some("PROMPT_TUNING"), claims: |_| true, read: prompt_tuning::from_peft },
    FromPeft { peft_type: Some("PSOFT"), claims: |_| true, read: psoft::from_peft },
    FromPeft { peft_type: Some("PVERA"), claims: |_| true, read: pvera::from_peft },
    FromPeft { peft_type: Some("RANDLORA"), claims: |_| true, read: randlora::from_peft },
    FromPeft { peft_type: Some("ROAD"), claims: |_| true, read: road::from_peft },
    FromPeft { peft_type: Some("SHIRA"), claims: |_| true, read: shira::from_peft },
    FromPeft { peft_type: Some("SUPERTUNING"), claims: |_| true, read: supertuning::from_peft },
    FromPeft { peft_type: Some("TINYLORA"), claims: |_| true, read: tinylora::from_peft },
    FromPeft { peft_type: Some("TRAINABLE_TOKENS"), claims: |_| true, read: trainable_tokens::from_peft },
    FromPeft { peft_type: Some("UNILORA"), claims: |_| true, read: unilora::from_peft },
    FromPeft { peft_type: Some("VBLORA"), claims: |_| true, read: vblora::from_peft },
    FromPeft { peft_type: Some("VERA"), claims: |_| true, read: vera::from_peft },
    FromPeft { peft_type: Some("WAVEFT"), claims: |_| true, read: waveft::from_peft },
];
