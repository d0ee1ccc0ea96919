// First in, first out; whoever writes has counted that there is room (`gemv_pe` gives out DEPTH credits).
module result_fifo #(
    parameter WIDTH = 32,
    parameter DEPTH = 32               // a power of two
) (
    input  wire             clk,
    input  wire             rst,
    input  wire             write,
    input  wire [WIDTH-1:0] write_data,
    output wire             valid,
    input  wire             ready,
    output wire [WIDTH-1:0] data
);
    localparam A = $clog2(DEPTH);
    reg [WIDTH-1:0] memory [0:DEPTH-1];
    reg [A:0] head, tail;
    assign valid = head != tail;
    assign data  = memory[tail[A-1:0]];
    always @(posedge clk) begin
        if (write) memory[head[A-1:0]] <= write_data;
        if (rst) begin
            head <= 0;
            tail <= 0;
        end else begin
            if (write) head <= head + 1'b1;
            if (valid && ready) tail <= tail + 1'b1;
        end
    end
endmodule
