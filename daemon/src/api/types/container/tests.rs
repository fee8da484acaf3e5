use serde_json::{Value, json};

use super::*;

/// The body that docker CLI 28.2 sends for `docker run -it --rm -e A=b -p 80:8080 busybox sh`, shortened.
const CLI: &str = r#"{"Hostname":"","Domainname":"","User":"","AttachStdin":true,"AttachStdout":true,"AttachStderr":true,
"ExposedPorts":{"8080/tcp":{}},"Tty":true,"OpenStdin":true,"StdinOnce":true,"Env":["A=b"],"Cmd":["sh"],"Image":"busybox",
"Volumes":{},"WorkingDir":"","Entrypoint":null,"OnBuild":null,"Labels":{},"HostConfig":{"Binds":null,"ContainerIDFile":"",
"LogConfig":{"Type":"","Config":{}},"NetworkMode":"default","PortBindings":{"8080/tcp":[{"HostIp":"","HostPort":"80"}]},
"RestartPolicy":{"Name":"no","MaximumRetryCount":0},"AutoRemove":true,"ConsoleSize":[24,80],"Dns":[],"OomKillDisable":false,
"PidsLimit":0,"MaskedPaths":null,"ReadonlyPaths":[],"UTSMode":"","Ulimits":[{"Name":"nofile","Hard":10,"Soft":5}],
"BlkioDeviceReadIOps":[{"Path":"/dev/a","Rate":1}],"KernelMemoryTCP":0,"DeviceRequests":null},
"NetworkingConfig":{"EndpointsConfig":{"default":{"IPAMConfig":null,"Links":null,"MacAddress":"","IPAddress":""}}}}"#;

#[test]
fn what_the_cli_sends_is_read() {
    let request = CreateRequest::from_slice(CLI.as_bytes()).unwrap();
    assert_eq!(request.config.image, "busybox");
    assert_eq!(request.config.cmd.as_deref(), Some(&["sh".to_owned()][..]));
    assert!(request.config.stdin_once && request.host_config.auto_remove);
    assert_eq!(request.host_config.console_size, [24, 80]);
    assert_eq!(request.host_config.masked_paths, None);
    assert_eq!(request.host_config.readonly_paths, Some(vec![]));
    assert_eq!(request.host_config.blkio_device_read_iops.unwrap()[0].rate, 1);
    let ports = request.host_config.port_bindings.unwrap();
    assert_eq!(ports["8080/tcp"].as_ref().unwrap()[0].host_port, "80");
    assert!(request.networking_config.endpoints_config.unwrap().contains_key("default"));
}

#[test]
fn configs_keep_every_field_that_was_sent() {
    let request = CreateRequest::from_slice(CLI.as_bytes()).unwrap();
    let sent: Value = serde_json::from_str(CLI).unwrap();
    let host_config = serde_json::to_value(&request.host_config).unwrap();
    for (name, value) in sent["HostConfig"].as_object().unwrap() {
        // Go's omitempty.
        if name != "KernelMemoryTCP" {
            assert_eq!(&host_config[name], value, "HostConfig.{name}");
        }
    }
    let config = serde_json::to_value(&request.config).unwrap();
    for (name, value) in sent.as_object().unwrap() {
        if !["HostConfig", "NetworkingConfig"].contains(&name.as_str()) {
            assert_eq!(&config[name], value, "{name}");
        }
    }
    assert_eq!(serde_json::from_value::<HostConfig>(host_config).unwrap(), request.host_config);
    assert_eq!(serde_json::from_value::<Config>(config).unwrap(), request.config);
}

#[test]
fn a_body_of_other_case_and_nulls_is_read() {
    let body = json!({"image": "a", "CMD": "true", "hostconfig": null, "Env": null, "networkingConfig": {}});
    let request = CreateRequest::from_slice(body.to_string().as_bytes()).unwrap();
    assert_eq!(request.config.image, "a");
    assert_eq!(request.config.cmd.unwrap(), ["true"]);
    assert_eq!(request.host_config, HostConfig::default());
}

#[test]
fn a_wrong_type_is_named() {
    let error = CreateRequest::from_slice(br#"{"Image":"a","HostConfig":{"Memory":"1g"}}"#).unwrap_err();
    assert!(error.to_string().starts_with("HostConfig: Memory: invalid type: string"), "{error}");
}

#[test]
fn an_empty_inspect_renders_as_dockerd_renders_it() {
    insta::assert_json_snapshot!(Inspect::default());
}

#[test]
fn an_empty_summary_renders_as_dockerd_renders_it() {
    insta::assert_json_snapshot!(Summary::default());
}
