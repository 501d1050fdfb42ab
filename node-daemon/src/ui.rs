//! The page: the cluster as this node sees it, in a browser on this host.
//!
//! It is rendered here and needs no script: the script that comes with it only fetches the same again every few seconds, and
//! while somebody types. Every text from the cluster is escaped by the templates. It shows what a scrape would: the last sample
//! of the loop, its issues, and the denied flows; nobody waits for the loop.
//!
//! Who may see it is decided three times over (`access`): it listens on loopback; it wants the key that `huskctl ui` prints,
//! since any program of the host reaches loopback, and pods on the host's network do; and it answers only to a loopback `Host`,
//! so that no web site can make a browser read it through a name that leads here (DNS rebinding).

mod access;
mod map;
mod page;
pub mod served;
mod view;

use std::sync::Arc;

use hyper::StatusCode;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderValue, LOCATION, REFERRER_POLICY, SET_COOKIE};
use hyper::http::request::Parts;

pub use self::access::Key;
use self::access::{Access, Visit};
use self::view::{Query, View};
use crate::http::{Answer, Site, of_type, text};
use crate::metrics::gather::Gathering;

/// What the page may do: be styled and scripted from here, ask here, and nothing else.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; \
     form-action 'self'; frame-ancestors 'none'";

const STYLE: &str = include_str!("ui/style.css");

const SCRIPT: &str = include_str!("ui/app.js");

/// What somebody reads who has no key, or an old one.
const NO_KEY: &str = "This page wants a key: 'huskctl ui' on the node prints the address with it.\n";

/// What somebody reads who came by another name.
const FOREIGN_NAME: &str = "This page is served at localhost, 127.0.0.1 and [::1] only, under no other name.\n";

/// The site.
#[derive(Debug)]
pub struct Page {
    gathering: Gathering,
    access: Access,
}

impl Page {
    /// Shows what is gathered to whoever has the key.
    #[must_use]
    pub fn new(gathering: Gathering, key: Arc<Key>) -> Self {
        let access = Access::new(key, &gathering.fixed.node);
        Self { gathering, access }
    }

    fn view(&self, request: &Parts) -> View {
        View::of(&self.gathering, &Query::parse(request.uri.query().unwrap_or_default()))
    }

    fn shown(&self, request: &Parts) -> Answer {
        const HTML: &str = "text/html; charset=utf-8";
        match request.uri.path() {
            "/" => of_type(StatusCode::OK, HTML, page::whole(&self.view(request)).into_string()),
            "/part" => of_type(StatusCode::OK, HTML, page::part(&self.view(request)).into_string()),
            "/api/state" => match serde_json::to_vec(&self.view(request)) {
                Ok(json) => of_type(StatusCode::OK, "application/json", json),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            "/style.css" => of_type(StatusCode::OK, "text/css; charset=utf-8", STYLE),
            "/app.js" => of_type(StatusCode::OK, "text/javascript; charset=utf-8", SCRIPT),
            _ => text(StatusCode::NOT_FOUND, "there is no such page\n"),
        }
    }
}

impl Site for Page {
    async fn get(&self, request: &Parts) -> Answer {
        let mut answer = match self.access.judge(request) {
            Visit::Foreign => text(StatusCode::MISDIRECTED_REQUEST, FOREIGN_NAME),
            Visit::Unknown => text(StatusCode::UNAUTHORIZED, NO_KEY),
            Visit::WithKey(cookie) => {
                let mut answer = text(StatusCode::SEE_OTHER, "");
                answer.headers_mut().insert(LOCATION, HeaderValue::from_static("/"));
                answer.headers_mut().insert(SET_COOKIE, cookie);
                answer
            }
            Visit::Known => self.shown(request),
        };
        let headers = answer.headers_mut();
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        answer
    }
}

#[cfg(test)]
mod tests;
