//! Which methods somebody looks for.

use super::card::{Category, Merges, Point, SiteKind};
use super::document::MethodDocument;

/// What a method has to be like. All that is given counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of this extension point.
    pub point: Option<Point>,
    /// Tunes a model in this way.
    pub category: Option<Category>,
    /// Can be put on sites of this kind.
    pub site: Option<SiteKind>,
    /// Can be merged into the base.
    pub merges: bool,
    /// Is in Hugging Face PEFT as well.
    pub peft: bool,
    /// Works where linears of the base are held in few bits.
    pub few_bits: bool,
    /// Its name, an alias or its summary contains this, in whatever case.
    pub text: Option<String>,
}

impl Filter {
    /// Whether a method is like that.
    pub fn matches(&self, method: &MethodDocument) -> bool {
        let can_merge = matches!(method.merges, Merges::Factors | Merges::Weight);
        let text = self.text.as_ref().map(|text| text.to_lowercase());
        let texts = || [&method.name, &method.summary].into_iter().chain(&method.aliases);
        self.point.is_none_or(|point| point == method.point)
            && self.category.is_none_or(|category| method.category == Some(category))
            && self.site.is_none_or(|site| method.applies.contains(&site))
            && (!self.merges || can_merge)
            && (!self.peft || method.peft_type.is_some())
            && (!self.few_bits || method.on_quantized() == Some(true))
            && text.is_none_or(|text| texts().any(|own| own.to_lowercase().contains(&text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::Catalogue;

    fn found(filter: &Filter) -> Vec<&'static str> {
        let all = Catalogue::embedded().documents().filter(|method| filter.matches(method));
        all.map(|method| method.name.as_str()).collect()
    }

    #[test]
    fn methods_are_narrowed_by_what_they_can_do() {
        let has = |filter: &Filter, name: &str| found(filter).contains(&name);
        let on_mlps = Filter { site: Some(SiteKind::Mlp), ..Filter::default() };
        assert!(has(&on_mlps, "bottleneck") && !has(&on_mlps, "lora"));
        let merging = Filter { merges: true, site: Some(SiteKind::Linear), ..Filter::default() };
        assert!(has(&merging, "lora") && !has(&merging, "loramoe") && !has(&merging, "cosine"));
        let in_peft = Filter { peft: true, ..Filter::default() };
        assert!(has(&in_peft, "lora") && !has(&in_peft, "dsee"));
        let prompts = Filter { category: Some(Category::Prompt), ..Filter::default() };
        assert!(has(&prompts, "prefix-tuning") && !has(&prompts, "lora") && !has(&prompts, "cosine"));
        let beside_few_bits = Filter { few_bits: true, point: Some(Point::Adapter), ..Filter::default() };
        assert!(has(&beside_few_bits, "lora") && !has(&beside_few_bits, "full"));
    }

    #[test]
    fn methods_are_narrowed_by_point_and_text() {
        let count = |point: Option<Point>, text: Option<&str>| {
            found(&Filter { point, text: text.map(str::to_owned), ..Filter::default() }).len()
        };
        assert!(count(None, None) > count(Some(Point::Adapter), None));
        assert!(count(Some(Point::Adapter), Some("LOW-RANK adaptation")) > 0);
        assert!(count(Some(Point::Adapter), Some("LOW-RANK adaptation")) < count(Some(Point::Adapter), None));
        assert_eq!(count(Some(Point::Optimizer), Some("low-rank adaptation")), 0);
    }
}
