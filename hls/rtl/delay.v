// `d`, CYCLES later. No reset, so that it becomes shift-register LUTs (SRL16E) rather than flip-flops.
module delay #(
    parameter WIDTH  = 1,
    parameter CYCLES = 1
) (
    input  wire             clk,
    input  wire [WIDTH-1:0] d,
    output wire [WIDTH-1:0] q
);
    generate
        if (CYCLES == 0) begin : none
            assign q = d;
        end else begin : some
            reg [WIDTH-1:0] line [0:CYCLES-1];
            integer i;
            always @(posedge clk) begin
                line[0] <= d;
                for (i = 1; i < CYCLES; i = i + 1) line[i] <= line[i-1];
            end
            assign q = line[CYCLES-1];
        end
    endgenerate
endmodule
