//! Rules of the contract that no compiler checks, read from the descriptor set: the parts of buf's STANDARD that can go
//! wrong here, and a comment on everything.

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::Type,
};

fn files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap();
    set.file.into_iter().filter(|file| file.package() == "attune.v1").collect()
}

/// Paths (see `SourceCodeInfo.Location.path`) that have a comment before them.
fn commented(file: &FileDescriptorProto) -> BTreeSet<Vec<i32>> {
    let info = file.source_code_info.as_ref().expect("the set has source information");
    let has = |text: &Option<String>| text.as_deref().is_some_and(|text| text.trim().len() > 3);
    info.location.iter().filter(|at| has(&at.leading_comments)).map(|at| at.path.clone()).collect()
}

fn snake(name: &str) -> String {
    let mut out = String::new();
    for (i, c) in name.chars().enumerate() {
        if c.is_ascii_uppercase() && i > 0 {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

fn check_enum(item: &EnumDescriptorProto, path: &[i32], comments: &BTreeSet<Vec<i32>>, faults: &mut Vec<String>) {
    let prefix = snake(item.name()).to_ascii_uppercase();
    if !comments.contains(path) {
        faults.push(format!("enum {} has no comment", item.name()));
    }
    for (i, value) in item.value.iter().enumerate() {
        if !comments.contains(&[path, &[2, i as i32]].concat()) {
            faults.push(format!("{} has no comment", value.name()));
        }
        if !value.name().starts_with(&format!("{prefix}_")) {
            faults.push(format!("{} does not start with {prefix}_", value.name()));
        }
    }
    if item.value.first().map(|value| (value.name().to_owned(), value.number()))
        != Some((format!("{prefix}_UNSPECIFIED"), 0))
    {
        faults.push(format!("enum {} does not start with {prefix}_UNSPECIFIED = 0", item.name()));
    }
}

fn check_field(owner: &str, field: &FieldDescriptorProto, faults: &mut Vec<String>) {
    let name = field.name();
    if snake(name) != name {
        faults.push(format!("{owner}.{name} is not lower_snake_case"));
    }
    // Sizes say their unit, and times are timestamps rather than numbers.
    if name.ends_with("size") && name != "page_size" {
        faults.push(format!("{owner}.{name} needs the unit _bytes"));
    }
    if name.ends_with("_time") && field.type_name() != ".google.protobuf.Timestamp" {
        faults.push(format!("{owner}.{name} is not a Timestamp"));
    }
    // Opaque bytes are content only: chunks and the manifest file.
    if field.r#type() == Type::Bytes && !["data", "manifest"].contains(&name) {
        faults.push(format!("{owner}.{name} is opaque bytes"));
    }
    if name.contains("json") {
        faults.push(format!("{owner}.{name} looks like JSON in a string"));
    }
}

fn check_message(item: &DescriptorProto, path: &[i32], comments: &BTreeSet<Vec<i32>>, faults: &mut Vec<String>) {
    if item.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry) {
        return;
    }
    if !comments.contains(path) {
        faults.push(format!("message {} has no comment", item.name()));
    }
    for (i, field) in item.field.iter().enumerate() {
        if !comments.contains(&[path, &[2, i as i32]].concat()) {
            faults.push(format!("{}.{} has no comment", item.name(), field.name()));
        }
        check_field(item.name(), field, faults);
    }
    for (i, nested) in item.nested_type.iter().enumerate() {
        check_message(nested, &[path, &[3, i as i32]].concat(), comments, faults);
    }
    for (i, nested) in item.enum_type.iter().enumerate() {
        check_enum(nested, &[path, &[4, i as i32]].concat(), comments, faults);
    }
}

#[test]
fn everything_has_a_comment_and_a_standard_name() {
    let mut faults = Vec::new();
    for file in files() {
        let comments = commented(&file);
        for (i, message) in file.message_type.iter().enumerate() {
            check_message(message, &[4, i as i32], &comments, &mut faults);
        }
        for (i, item) in file.enum_type.iter().enumerate() {
            check_enum(item, &[5, i as i32], &comments, &mut faults);
        }
        for (i, service) in file.service.iter().enumerate() {
            for (path, name) in std::iter::once((vec![6, i as i32], service.name().to_owned())).chain(
                service
                    .method
                    .iter()
                    .enumerate()
                    .map(|(m, rpc)| (vec![6, i as i32, 2, m as i32], rpc.name().to_owned())),
            ) {
                if !comments.contains(&path) {
                    faults.push(format!("{name} has no comment"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_rpc_has_its_own_request_and_response() {
    let mut seen = BTreeSet::new();
    let mut services = Vec::new();
    for file in files() {
        for service in &file.service {
            services.push(service.name().to_owned());
            for rpc in &service.method {
                assert_eq!(rpc.input_type(), format!(".attune.v1.{}Request", rpc.name()));
                assert_eq!(rpc.output_type(), format!(".attune.v1.{}Response", rpc.name()));
                assert!(seen.insert(rpc.name().to_owned()), "{} is named twice", rpc.name());
            }
        }
    }
    services.sort();
    assert_eq!(
        services,
        [
            "ArtifactService",
            "AuditService",
            "FleetService",
            "JobService",
            "MethodService",
            "TokenService",
            "WorkerService"
        ]
    );
    assert_eq!(seen.len(), 10 + 1 + 9 + 2 + 6 + 4 + 1);
}

#[test]
fn every_request_names_its_project_and_every_list_has_pages_and_an_order() {
    for file in files() {
        for message in file.message_type.iter().filter(|message| message.name().ends_with("Request")) {
            let has = |name: &str| message.field.iter().any(|field| field.name() == name);
            // The two streams from the client say it in their first message; a worker belongs to no tenant.
            const NAME_NONE: [&str; 4] =
                ["PushArtifactRequest", "ConnectRequest", "CordonWorkerRequest", "UncordonWorkerRequest"];
            if !NAME_NONE.contains(&message.name()) {
                assert_eq!(message.field[0].name(), "project", "{}", message.name());
            }
            if message.name().starts_with("List") {
                // What has no time has one order, that of the names.
                let has_order =
                    has("order_by") || ["ListWorkersRequest", "ListProjectsRequest"].contains(&message.name());
                assert!(has("page_size") && has("page_token") && has_order, "{}", message.name());
            }
            if message.name() == "CreateJobRequest" || message.name() == "RetryJobRequest" {
                assert!(has("request_id"), "{}", message.name());
            }
        }
    }
}

#[test]
fn reflection_knows_error_details_too() {
    let set = FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap();
    let packages: BTreeSet<_> = set.file.iter().map(|file| file.package().to_owned()).collect();
    assert_eq!(packages.into_iter().collect::<Vec<_>>(), ["attune.v1", "google.protobuf", "google.rpc"]);
}
