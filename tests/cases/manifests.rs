//! The manifests as far as they can be judged without a cluster: configurations, versions, and what the admission policy decides.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use cel::{Context, Program, Value as CelValue};
use husk_overlay::config::Config;
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy as Policy, ValidatingAdmissionPolicyBinding as Binding,
};
use serde_json::{Value, json};

const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests");

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Whom the policies are about.
const DAEMON: &str = "system:serviceaccount:husk-system:husk";

/// Every file below a directory of the manifests.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

#[test]
fn every_configuration_is_one_and_says_what_its_overlay_is_called() -> Result<()> {
    let all = files(Path::new(DIRECTORY))?;
    let configurations: Vec<_> = all.iter().filter(|path| path.ends_with("config.yaml")).collect();
    ensure!(configurations.len() == 6, "{configurations:?}");
    for path in configurations {
        let config = Config::parse(&path.display().to_string(), &fs::read_to_string(path)?)?;
        let overlay = path.parent().and_then(Path::file_name).context("a file without a directory")?;
        let mode = ["vxlan", "ipsec", "vxlan-ipsec"].into_iter().find(|mode| overlay == *mode).unwrap_or("wireguard");
        ensure!(config.mode.to_string() == mode, "{}: {}", path.display(), config.mode);
        let families = if overlay == "dual-stack" { 2 } else { 1 };
        ensure!(config.cluster_cidrs.len() == families, "{}: {:?}", path.display(), config.cluster_cidrs);
    }
    Ok(())
}

#[test]
fn the_version_is_the_same_everywhere() -> Result<()> {
    let (image, label) = (format!("image: husk.dev/husk:{VERSION}"), format!("app.kubernetes.io/version: {VERSION}"));
    let mut seen = 0;
    for path in files(Path::new(DIRECTORY))? {
        let text = fs::read_to_string(&path)?;
        for line in text.lines().map(|line| line.trim().trim_start_matches("- ")) {
            let right = match line {
                line if line.starts_with("image: ") => line == image,
                line if line.starts_with("app.kubernetes.io/version: ") => line == label,
                _ => continue,
            };
            ensure!(right, "{}: {line}, but this is {VERSION}", path.display());
            seen += 1;
        }
    }
    ensure!(seen >= 6, "only {seen} lines name a version");
    Ok(())
}

/// The documents of the admission policy, of which the types of Kubernetes know every field.
fn policies() -> Result<Vec<Policy>> {
    let text = fs::read_to_string(Path::new(DIRECTORY).join("components/admission-policy/policy.yaml"))?;
    let (mut policies, mut bound) = (Vec::new(), Vec::new());
    for document in text.split("\n---\n") {
        let written: Value = serde_saphyr::from_str(document)?;
        let understood = if written["kind"] == "ValidatingAdmissionPolicy" {
            let policy: Policy = serde_json::from_value(written.clone())?;
            policies.push(policy.clone());
            serde_json::to_value(policy)?
        } else {
            let binding: Binding = serde_json::from_value(written.clone())?;
            bound.push(binding.clone().spec.and_then(|spec| spec.policy_name));
            serde_json::to_value(binding)?
        };
        ensure!(understood == written, "Kubernetes understands {understood} of {written}");
    }
    let names: Vec<_> = policies.iter().map(|policy| policy.metadata.name.clone()).collect();
    ensure!(names == bound, "there are {names:?}, in force are {bound:?}");
    Ok(policies)
}

/// A request as an API server shows it to a policy.
struct Request {
    user: &'static str,
    /// The node that the token names.
    node: Option<&'static str>,
    operation: &'static str,
    group: &'static str,
    resource: &'static str,
    object: Value,
    old: Value,
}

impl Request {
    /// By the daemon of the node `a`, about the object of its own name.
    fn about(resource: &'static str, operation: &'static str, object: Value) -> Self {
        let group = if resource.starts_with("nodes") { "" } else { "husk.dev" };
        let old = if operation == "CREATE" { Value::Null } else { object.clone() };
        let object = if operation == "DELETE" { Value::Null } else { object };
        Self { user: DAEMON, node: Some("a"), operation, group, resource, object, old }
    }

    fn by(self, user: &'static str, node: Option<&'static str>) -> Self {
        Self { user, node, ..self }
    }

    /// What the policies say against it.
    fn objections(&self, policies: &[Policy]) -> Result<Vec<String>> {
        let specs = policies.iter().filter_map(|policy| policy.spec.as_ref());
        let mut objections = Vec::new();
        for spec in specs {
            let rules = spec.match_constraints.as_ref().and_then(|it| it.resource_rules.as_ref());
            let has = |list: &Option<Vec<String>>, wanted: &str| list.iter().flatten().any(|it| it == wanted);
            let concerned = rules.into_iter().flatten().any(|rule| {
                let (groups, resources) = (has(&rule.api_groups, self.group), has(&rule.resources, self.resource));
                groups && resources && has(&rule.operations, self.operation)
            });
            let mut context = self.context()?;
            let conditions = spec.match_conditions.iter().flatten();
            let met = conditions.map(|it| is_true(&it.expression, &context)).collect::<Result<Vec<_>>>()?;
            if !concerned || met.contains(&false) {
                continue;
            }
            let variables = spec.variables.iter().flatten();
            let variables = variables.map(|it| Ok((it.name.clone(), evaluate(&it.expression, &context)?)));
            let variables = variables.collect::<Result<std::collections::HashMap<_, _>>>()?;
            context.add_variable_from_value("variables", variables);
            for validation in spec.validations.iter().flatten() {
                if !is_true(&validation.expression, &context)? {
                    let said = validation.message_expression.as_ref().map(|it| evaluate(it, &context)).transpose()?;
                    objections.push(match (said, &validation.message) {
                        (Some(CelValue::String(said)), _) => said.to_string(),
                        (None, Some(said)) => said.clone(),
                        other => anyhow::bail!("{other:?} is no message"),
                    });
                }
            }
        }
        Ok(objections)
    }

    fn context(&self) -> Result<Context<'static, 'static>> {
        let mut context = Context::default();
        let mut user = json!({"username": self.user});
        if let Some(node) = self.node {
            user["extra"] = json!({"authentication.kubernetes.io/node-name": [node]});
        }
        let request = json!({"userInfo": user, "operation": self.operation});
        for (name, value) in [("request", &request), ("object", &self.object), ("oldObject", &self.old)] {
            context.add_variable(name, value).with_context(|| format!("{name} cannot be {value}"))?;
        }
        Ok(context)
    }
}

fn evaluate(expression: &str, context: &Context<'_, '_>) -> Result<CelValue> {
    let program = Program::compile(expression).with_context(|| expression.to_owned())?;
    program.execute(context).with_context(|| expression.to_owned())
}

fn is_true(expression: &str, context: &Context<'_, '_>) -> Result<bool> {
    match evaluate(expression, context)? {
        CelValue::Bool(value) => Ok(value),
        other => anyhow::bail!("{expression} is {other:?}"),
    }
}

fn named(name: &str) -> Value {
    json!({"metadata": {"name": name}})
}

fn block_of(node: &str) -> Value {
    json!({"metadata": {"name": "10.244.1.0-24"}, "spec": {"cidr": "10.244.1.0/24", "node": node}})
}

#[test]
fn a_daemon_writes_only_what_is_about_its_node() -> Result<()> {
    let policies = policies()?;
    let allowed = |request: Request| request.objections(&policies);
    let written = [
        ("overlaynodes", "CREATE"),
        ("overlaynodes", "UPDATE"),
        ("overlaynodes/status", "UPDATE"),
        ("nodes/status", "UPDATE"),
    ];
    for (resource, operation) in written {
        let about = |name| Request::about(resource, operation, named(name));
        let own = allowed(about("a"))?;
        ensure!(own.is_empty(), "{operation} of the own {resource}: {own:?}");
        let others = allowed(about("b"))?.concat();
        ensure!(
            others.contains("the daemon of node a") && others.contains("about b"),
            "{operation} {resource}: {others}"
        );
        let nobodys = allowed(about("a").by(DAEMON, None))?.concat();
        ensure!(nobodys.contains("the token names no node"), "{operation} {resource}: {nobodys}");
        let person = allowed(about("b").by("kubernetes-admin", None))?;
        ensure!(person.is_empty(), "{operation} of {resource} by a person: {person:?}");
        let neighbour = allowed(about("b").by("system:serviceaccount:other:husk", Some("a")))?;
        ensure!(neighbour.is_empty(), "{operation} of {resource} by another account: {neighbour:?}");
    }
    // Whoever notices that a node is gone removes its record.
    ensure!(allowed(Request::about("overlaynodes", "DELETE", named("b")))?.is_empty());
    Ok(())
}

#[test]
fn a_daemon_takes_blocks_for_its_node_only() -> Result<()> {
    let policies = policies()?;
    let objections = |request: Request| request.objections(&policies);
    let about = |operation, node| Request::about("addressblocks", operation, block_of(node));
    for operation in ["CREATE", "UPDATE"] {
        ensure!(objections(about(operation, "a"))?.is_empty(), "{operation} of the own block");
        let others = objections(about(operation, "b"))?.concat();
        ensure!(others.contains("for that node only"), "{operation} of another's block: {others}");
        ensure!(!objections(about(operation, "a").by(DAEMON, None))?.is_empty(), "{operation} by nobody's token");
    }
    for (old, new) in [("b", "a"), ("a", "b")] {
        let moved = Request { old: block_of(old), ..about("UPDATE", new) };
        ensure!(!objections(moved)?.is_empty(), "a block of {old} became one of {new}");
    }
    ensure!(objections(about("DELETE", "b"))?.is_empty(), "blocks of a node that is gone are given back by others");
    Ok(())
}
