//! What can be named in a job file.

use attune_proto::Class;
use attune_proto::convert::structure::to_struct;
use attune_proto::v1::method_service_server::MethodService;
use attune_proto::v1::{self, ExtensionPoint};
use attune_proto::words::Word as _;
use attune_spec::method::{Catalogue, Category, Filter, ManualDocument, Merges, MethodDocument, Point, SiteKind};
use attune_spec::{Fault, FieldPath};
use serde_json::Value;
use tonic::{Request, Response, Status};

use super::{invalid, known, page_size, page_token};
use crate::guard::received;

/// The service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Methods;

fn point(document: &MethodDocument) -> ExtensionPoint {
    ExtensionPoint::from_word(document.point.as_str()).unwrap_or(ExtensionPoint::Unspecified)
}

const fn site(kind: SiteKind) -> v1::SiteKind {
    match kind {
        SiteKind::Linear => v1::SiteKind::Linear,
        SiteKind::Embedding => v1::SiteKind::Embedding,
        SiteKind::Norm => v1::SiteKind::Norm,
        SiteKind::Attention => v1::SiteKind::Attention,
        SiteKind::Mlp => v1::SiteKind::Mlp,
    }
}

const fn category(of: Category) -> v1::MethodCategory {
    match of {
        Category::Selective => v1::MethodCategory::Selective,
        Category::Additive => v1::MethodCategory::Additive,
        Category::Prompt => v1::MethodCategory::Prompt,
        Category::Reparameterisation => v1::MethodCategory::Reparameterisation,
        Category::Hybrid => v1::MethodCategory::Hybrid,
    }
}

/// Which methods a request asks for.
fn filter(request: &v1::ListMethodsRequest) -> Result<Filter, Status> {
    let wanted: ExtensionPoint = known(request.point, "point")?;
    let (of, on): (v1::MethodCategory, v1::SiteKind) =
        (known(request.category, "category")?, known(request.site, "site")?);
    Ok(Filter {
        point: Point::ALL.into_iter().find(|point| ExtensionPoint::from_word(point.as_str()) == Some(wanted)),
        category: Category::ALL.into_iter().find(|known| category(*known) == of),
        site: SiteKind::ALL.into_iter().find(|kind| site(*kind) == on),
        merges: request.merges,
        peft: request.peft,
        few_bits: request.few_bits,
        text: Some(&request.text).filter(|text| !text.is_empty()).cloned(),
    })
}

fn card(document: &MethodDocument) -> v1::Method {
    v1::Method {
        name: document.name.clone(),
        point: point(document) as i32,
        summary: document.summary.clone(),
        paper: document.paper.as_ref().map(|paper| v1::Paper {
            title: paper.title.clone(),
            authors: paper.authors.clone(),
            year: u32::from(paper.year),
        }),
        aliases: document.aliases.clone(),
        applies: document.applies.iter().map(|kind| site(*kind) as i32).collect(),
        targets: document.targets.clone(),
        parameters: document.parameters.clone(),
        trains_base: document.trains_base,
        shared: document.shared.clone(),
        moves: document.moves.clone().unwrap_or_default(),
        becomes: document.becomes.clone().into_iter().collect(),
        on_quantized: document.on_quantized(),
        needs_quantization: document.needs_quantization,
        compares_vectors: document.compares_vectors,
        merges: match document.merges {
            Merges::Factors => v1::MergeForm::Factors,
            Merges::Weight => v1::MergeForm::Weight,
            Merges::No => v1::MergeForm::No,
            Merges::NotApplicable => v1::MergeForm::NotApplicable,
        } as i32,
        category: document.category.map_or(v1::MethodCategory::Unspecified, category) as i32,
        peft_type: document.peft_type.clone().unwrap_or_default(),
        rules: document
            .rules
            .iter()
            .map(|rule| v1::MethodRule {
                when: rule.when.clone(),
                require: rule.require.clone(),
                message: rule.message.clone(),
                path: rule.path.clone(),
            })
            .collect(),
        schema: None,
        defaults: None,
        manual: None,
    }
}

fn manual(document: &MethodDocument) -> v1::MethodManual {
    let ManualDocument { update, symbols, cost, limits, departures } = document.manual.clone();
    v1::MethodManual { update, symbols, cost, limits, departures }
}

#[tonic::async_trait]
impl MethodService for Methods {
    async fn list_methods(
        &self,
        request: Request<v1::ListMethodsRequest>,
    ) -> Result<Response<v1::ListMethodsResponse>, Status> {
        let (caller, request) = received(request)?;
        caller.project(&request.project)?;
        let rows = page_size(request.page_size, 1000, 1000)? as usize;
        let filter = filter(&request)?;
        let order: v1::MethodOrder = known(request.order_by, "order_by")?;
        let all = Catalogue::embedded().documents();
        let mut documents: Vec<&MethodDocument> = all.filter(|document| filter.matches(document)).collect();
        if order == v1::MethodOrder::Point {
            documents.sort_by_key(|document| document.point);
        }
        let start = match page_token(&request.page_token) {
            None => 0,
            // The token is the name of the last method of the page before.
            Some(token) => {
                let last = documents.iter().position(|document| document.name == token);
                last.ok_or_else(|| invalid(Fault::new("page_token", "was not given out by an earlier page")))? + 1
            }
        };
        let page: Vec<_> = documents.iter().skip(start).take(rows).collect();
        let is_last = start + page.len() == documents.len();
        let next = page.last().filter(|_| !is_last).map(|last| last.name.clone());
        let methods = page.into_iter().map(|document| card(document)).collect();
        Ok(Response::new(v1::ListMethodsResponse { methods, next_page_token: next.unwrap_or_default() }))
    }

    async fn get_method(
        &self,
        request: Request<v1::GetMethodRequest>,
    ) -> Result<Response<v1::GetMethodResponse>, Status> {
        let (caller, request) = received(request)?;
        caller.project(&request.project)?;
        let catalogue = Catalogue::embedded();
        let document = catalogue.get(&request.method);
        let document = document.ok_or_else(|| Class::NotFound.status(catalogue.unknown(&request.method)))?;
        let object = |name: &str, value: &Value| {
            let object = value.as_object().ok_or_else(|| Fault::new(name, "is no object"));
            let converted = object.and_then(|object| to_struct(object, &FieldPath::from(name)));
            converted.map_err(|fault| Class::Internal.status(format!("method {:?}: {fault}", document.name)))
        };
        let method = v1::Method {
            schema: Some(object("schema", &document.schema)?),
            defaults: Some(object("defaults", &document.defaults)?),
            manual: Some(manual(document)),
            ..card(document)
        };
        Ok(Response::new(v1::GetMethodResponse { method: Some(method) }))
    }
}
